"""Write the golden files of the current format: ``python tests/golden/make.py``.

A file that is there already stays as it is: what an earlier version wrote must stay readable. Give new ops a new file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import reference
from packed_models import Builder, described_net, quant_net, table_net, window

from lowbit.packed import FORMAT, PackedModel

HERE = Path(__file__).parent


def float_ops() -> PackedModel:
    """The ops between layers, on floats."""
    rng = np.random.default_rng(1)
    net = Builder((4, 5, 5))
    scale, shift = rng.normal(size=(2, 4)).astype(np.float32)
    net.op("affine", tensors={"scale": scale, "shift": shift})
    net.op("hardtanh", min=-0.5, max=1)
    net.op("relu", inputs=[1])
    net.op("add", inputs=[2, 3])
    net.op("max_pool", **window((3, 3), (2, 2), (1, 1)))
    net.op("avg_pool", count_include_pad=False, **window((2, 2), (1, 1), (1, 1)))
    return net.model


def prelu() -> PackedModel:
    """The op that came with ReActNet, slopes of both signs."""
    net = Builder((4, 5, 5))
    net.op("prelu", tensors={"slope": np.array([0.25, -1.5, 0, 2], np.float32)})
    return net.model


MODELS = {
    "binary": described_net,
    "codes": lambda: quant_net(np.random.default_rng(2)),
    "floats": float_ops,
    "prelu": prelu,
    "tables": lambda: table_net(np.random.default_rng(3)),
}


if __name__ == "__main__":
    for name, make in MODELS.items():
        path = HERE / f"format{FORMAT}-{name}.lowbit"
        if path.exists():
            continue
        model = make()
        model.save(path)
        images = np.random.default_rng(4).normal(size=(3, *model.input_shape)).astype(np.float32)
        outputs = reference.run(model, images)[-1].transpose(0, 3, 1, 2)
        np.savez(path.with_suffix(".npz"), images=images, outputs=outputs)

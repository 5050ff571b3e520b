"""WAGE's networks in the packed file: nothing but integers between the first sums and the last."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import checked, ops
from interpreter import Interpreter

import lowbit
from lowbit import methods, models
from lowbit.exporter.lower import FEW_BITS

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
WIDTHS = [{}, {"bits_a": 2}, {"bits_w": 3, "bits_a": 4}, {"bits_w": 8, "bits_g": 12}]


def network(name: str, **options: int) -> torch.nn.Module:
    """Narrow, with the weights of a few random updates behind it."""
    method = methods.registry["wage"](**options)
    sizes = {} if name == "nin" else {"width": 1 / 8}
    model = models.create(name, num_classes=4, method=method, image_size=16, **sizes)
    for layer in lowbit.layers.quantized_layers(model):
        for _ in range(3):
            method.update(layer.weight.data, torch.randn(layer.weight.shape), 8.0)
    return model.eval()


@pytest.mark.parametrize("options", WIDTHS, ids=str)
def test_lenet(options: dict[str, int]) -> None:
    model = network("lenet", **options)
    exported, report = checked(model, IMAGES)
    # Many codes come from floats by way of thresholds that all channels share, so from what the pool leaves.
    codes = ["threshold", "max_pool"] if options.get("bits_a", 8) <= FEW_BITS else ["max_pool", "relu", "threshold"]
    assert ops(exported) == ["conv2d", *codes, "quant_conv2d", "max_pool", "quant_conv2d", "quant_conv2d"]
    assert all(check.exact for check in report.layers[1:])
    grids = [op for op in exported.packed.ops if op["op"] == "quant_conv2d"]
    top_w, top_a = (2 ** (options.get(bits, default) - 1) - 1 for bits, default in (("bits_w", 2), ("bits_a", 8)))
    for op in grids:
        assert (op["weight_multiplier"], op["weight_offset"]) == (1, -top_w)
        assert (op["input_multiplier"], op["input_offset"]) == (1, -top_a)


@pytest.mark.parametrize("name", ["vgg_small", "nin"])
def test_other_models(name: str) -> None:
    exported, _ = checked(network(name), IMAGES)
    assert "quant_conv2d" in ops(exported)


def test_engine_and_interpreter_give_the_codes_of_the_torch_model() -> None:
    """Layer by layer, from the codes that the first quantizer makes."""
    model = network("lenet")
    exported = lowbit.export(model, IMAGES)
    packed = exported.packed
    values, run = [IMAGES.permute(0, 2, 3, 1).numpy()], Interpreter(packed)
    for index, op in enumerate(packed.ops):
        values.append(run.run_op(index, [values[number] for number in op["inputs"]]))
    with torch.no_grad():
        after_first = model[0](IMAGES)
        codes = model[1].conv.activation_quantizer.encode(after_first)[0].permute(0, 2, 3, 1).numpy()
        assert np.array_equal(values[ops(exported).index("quant_conv2d")], codes)
        assert len(np.unique(codes)) > 20
        np.testing.assert_array_equal(lowbit.Engine(packed)(IMAGES.numpy()), model(IMAGES).numpy())


def test_all_scales_are_powers_of_two() -> None:
    packed = lowbit.export(network("lenet"), IMAGES).packed
    scales = [tensor for key, tensor in packed.tensors.items() if key.endswith("scale")]
    assert len(scales) == 2
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)

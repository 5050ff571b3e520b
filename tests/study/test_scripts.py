"""The scripts in studies/: CIFAR-10 as JPEG files from its binary version, and the curve of 2018 beside ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowbit.data.cifar10 import CLASSES
from lowbit.errors import LowbitError
from lowbit.runs import write_json

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))


def test_cifar10_as_jpeg_files(tmp_path: Path) -> None:
    from cifar10_jpeg import PARTS, write_copy

    random = np.random.default_rng(0)
    source = tmp_path / "cifar-10-batches-bin"
    source.mkdir()
    images: dict[str, list[tuple[int, np.ndarray]]] = {part: [] for part in PARTS}
    for part, names in PARTS.items():
        for name in names:
            labels = random.permutation([*range(10), 3])
            # Smooth: red rises to the right, green downwards; JPEG keeps it nearly.
            ramp = np.arange(32, dtype=np.uint8) * 4
            records = b""
            for label in labels:
                blue = random.integers(0, 200)
                planes = np.stack([np.tile(ramp, (32, 1)), np.tile(ramp[:, None], (1, 32)), np.full((32, 32), blue)])
                images[part].append((int(label), planes))
                records += bytes([label]) + planes.astype(np.uint8).tobytes()
            (source / name).write_bytes(records)
    out = tmp_path / "data"
    assert write_copy(source, out) == 66
    assert sorted(path.name for path in (out / "train" / "cat").iterdir()) == [f"{n:04d}.jpg" for n in range(10)]
    for part, expected in images.items():
        seen = dict.fromkeys(CLASSES, 0)
        for label, planes in expected:
            name = CLASSES[label]
            with Image.open(out / part / name / f"{seen[name]:04d}.jpg") as image:
                assert [sampling[1:3] for sampling in image.layer] == [(2, 2), (1, 1), (1, 1)], "4:2:0"
                assert image.quantization[0][:8] == [8, 6, 5, 8, 12, 20, 26, 31], "libjpeg's table for quality 75"
                difference = np.asarray(image).astype(int) - planes.transpose(1, 2, 0)
            assert np.abs(difference).mean() < 4
            seen[name] += 1
    with pytest.raises(LowbitError, match="exists; choose another folder"):
        write_copy(source, out)
    for content in (b"", records[:-1], b"\x0a" + records[1:]):
        (source / "data_batch_1.bin").write_bytes(content)
        with pytest.raises(LowbitError, match="is no batch of CIFAR-10"):
            write_copy(source, tmp_path / f"other-{len(content)}-{content[:1]!r}")
    with pytest.raises(LowbitError, match="cannot read"):
        write_copy(tmp_path, tmp_path / "none")


def test_the_curve_of_2018_beside_ours(tmp_path: Path) -> None:
    import nin_2018

    (tmp_path / "nin_2018.csv").write_text((nin_2018.RESULTS / "nin_2018.csv").read_text())
    for name, model in (("binary", "nin"), ("other", "vgg16")):
        folder = tmp_path / "cifar10" / name
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"model": {"name": model}, "epochs": 2})
        (folder / "metrics.csv").write_text("epoch,train_loss,test_accuracy\n1,1.5,0.4\n2,1.2,0.55\n")
    found = nin_2018.curves(tmp_path)
    assert list(found) == ["2018, 320 epochs", "lowbit, binary (2 epochs)"]
    of_2018, ours = found.values()
    assert max(row["test_accuracy"] for row in of_2018) == 0.8483
    assert [row["test_accuracy"] for row in ours] == [0.4, 0.55]
    pytest.importorskip("matplotlib", reason="needs `pip install 'lowbit[bench]'`")
    nin_2018.draw(found, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()

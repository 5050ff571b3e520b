"""What weights to start from mean the same in the model that takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit import models
from lowbit.errors import LowbitError, UsageError
from lowbit.training.checkpoints import save_weights
from lowbit.training.initialise import init_from


def test_init_from_takes_what_fits(tmp_path: Path) -> None:
    source = models.create("vgg_small", method="float", width=0.0625)
    save_weights(source, tmp_path / "float.safetensors")
    twin = models.create("vgg_small", method="float", width=0.0625)
    report = init_from(twin, tmp_path / "float.safetensors")
    assert report.reshaped == report.missing == report.unused == report.norms == ()
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), source.state_dict().values(), strict=True))

    binary = models.create("vgg_small", method="xnor_net", width=0.0625)
    report = init_from(binary, tmp_path / "float.safetensors")
    state, given = binary.state_dict(), source.state_dict()
    assert any(name.endswith("conv.weight") for name in report.loaded)
    assert all(torch.equal(state[name], given[name]) for name in report.loaded)
    assert not any("norm" in name for name in report.loaded)
    assert report.norms
    everything = {*report.loaded, *report.norms, *report.reshaped, *report.missing}
    assert everything == set(state)
    assert "different places" in str(report)

    wider = models.create("vgg_small", method="float", width=0.0625, num_classes=7)
    report = init_from(wider, tmp_path / "float.safetensors")
    assert report.reshaped
    assert all(state_name in str(report) for state_name in report.reshaped)


def test_init_from_says_what_is_wrong(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="does not exist"):
        init_from(model, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(LowbitError, match="no safetensors file"):
        init_from(model, tmp_path / "bad.safetensors")
    save_weights(nn.Sequential(nn.Linear(3, 3)), tmp_path / "other.safetensors")
    with pytest.raises(LowbitError, match="none of its 2 tensors fits"):
        init_from(model, tmp_path / "other.safetensors")


def saved_run(folder: Path, method: str, **options: Any) -> nn.Module:
    """A run folder with the weights of a LeNet whose quantizers have seen a batch."""
    model = models.create("lenet", method=method, width=0.2, method_options=options)
    model.train()(torch.randn(4, 3, 32, 32))
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"method": {"name": method, "options": options}, "finished": "2026"})
    )
    save_weights(model, folder / "model.safetensors")
    return model


def quantizer_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "_quantizer." in name}


def test_steps_of_a_grid_of_other_bits_are_not_taken(tmp_path: Path) -> None:
    of_four = saved_run(tmp_path / "four", "lsq", bits_w=4, bits_a=4)
    two = models.create("lenet", method="lsq", width=0.2, method_options={"bits_w": 2, "bits_a": 2})
    fresh = {name: value.clone() for name, value in quantizer_tensors(two).items()}
    report = init_from(two, tmp_path / "four")
    assert report.quantizers
    assert set(report.quantizers) == set(fresh)
    assert all(torch.equal(value, fresh[name]) for name, value in quantizer_tensors(two).items())
    assert torch.equal(two.state_dict()["1.conv.weight"], of_four.state_dict()["1.conv.weight"])
    assert "another method or other bits" in str(report)


def test_steps_of_the_same_grid_are_taken(tmp_path: Path) -> None:
    source = saved_run(tmp_path / "four", "lsq", bits_w=4, bits_a=4)
    for start in (tmp_path / "four", tmp_path / "four" / "model.safetensors"):
        same = models.create("lenet", method="lsq", width=0.2, method_options={"bits_w": 4, "bits_a": 4})
        report = init_from(same, start)
        assert report.quantizers == ()
        expected = quantizer_tensors(source)
        assert all(torch.equal(value, expected[name]) for name, value in quantizer_tensors(same).items())


def test_names_that_two_methods_share_mean_different_things(tmp_path: Path) -> None:
    saved_run(tmp_path / "pact", "pact")
    model = models.create("lenet", method="adabin", width=0.2)
    assert not any("_quantizer." in name for name in init_from(model, tmp_path / "pact").loaded)


@pytest.mark.parametrize("method", ["bnn", "binary_connect"])
def test_other_classes_leave_all_norms_but_the_last(tmp_path: Path, method: str) -> None:
    save_weights(models.create("lenet", method=method, width=0.2), tmp_path / "ten.safetensors")
    model = models.create("lenet", method=method, width=0.2, num_classes=7)
    report = init_from(model, tmp_path / "ten.safetensors")
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert report.norms == ()
    assert any(name.startswith(f"{norms[0]}.") for name in report.loaded)
    assert all(name.startswith("3.") for name in report.reshaped)

"""The bench: its rows, its twins, and what it says when a peer is missing."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from nets import Plain, awkward_, chain, quantized
from rich.console import Console
from torch import nn

import lowbit
from lowbit import models, pretrained
from lowbit.errors import UsageError
from lowbit.exporter import bench as module
from lowbit.exporter import peers
from lowbit.exporter.bench import BenchResult, Row, bench, interleaved_medians, torch_runner
from lowbit.layers import PReLU
from lowbit.methods.hwgq import HalfWave
from lowbit.packed import read
from lowbit.packed.graph import OPS
from lowbit.runtime import Engine

IMAGES = torch.randn(2, 3, 16, 16)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)


def test_every_layer_has_its_time_its_speed_and_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lowbit.export(chain(), IMAGES).packed
    monkeypatch.setattr(module, "peak", lambda kind, isa: {"float": 1e11, "binary": 1e12}[kind])
    spent = [1e-3] * len(packed.ops)
    assert [op["op"] for op in packed.ops[:2]] == ["conv2d", "threshold"]
    spent[1] = 0.0
    monkeypatch.setattr(Engine, "profile", lambda self, x: spent)
    result = bench(packed, batch=2, threads=2)
    assert [(layer.name, layer.op) for layer in result.layers] == [(op["source"], op["op"]) for op in packed.ops]
    first, joined = result.layers[:2]
    assert (joined.kernel, joined.milliseconds, joined.gmacs, joined.weight_bytes) == (module.JOINED, 0, None, 0)
    assert first.kernel.startswith("float")
    assert first.weight_bytes == packed.tensors["0.weight"].nbytes
    for layer, cost in zip(result.layers, packed.costs(), strict=True):
        assert layer.macs == 2 * cost.macs
        if layer.macs:
            peak = {"conv2d": 100.0, "binary_conv2d": 1000.0}[layer.op]
            assert layer.gmacs == pytest.approx(layer.macs / 1e6)
            assert layer.share == pytest.approx(layer.gmacs / (2 * peak))
    assert result.to_dict()["layers"][0]["name"] == packed.ops[0]["source"]
    assert result.to_dict()["peaks"] == {"binary": 1000.0, "float": 100.0}
    console = Console(record=True, width=150)
    console.print(result.render())
    shown = console.export_text()
    assert module.JOINED in shown
    assert f"{first.share:.0%}".replace("%", " %") in shown
    assert "binary 1,000, float 100" in shown


def test_codes_multiplied_bit_by_bit_are_held_against_the_speed_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 2, 3)), "hwgq")
    packed = lowbit.export(model, IMAGES).packed
    index = [op["op"] for op in packed.ops].index("quant_conv2d")
    speeds = {"float": 1e11, "integer": 2e11, "binary": 1e12}
    monkeypatch.setattr(module, "peak", lambda kind, isa: speeds[kind])
    for kernel, most in (("planes.binary_subtract", 1000 / 2), ("bytes.sums", 200)):
        named = ["" if each != index else kernel for each in range(len(packed.ops))]
        monkeypatch.setattr(Engine, "kernels", property(lambda self, named=named: named))
        result = bench(packed)
        layer = result.layers[index]
        assert layer.share == pytest.approx(layer.gmacs / most)
        assert set(result.peaks) == {"float", "binary" if kernel.startswith("planes") else "integer"}


def test_every_op_with_products_has_a_kind_of_product() -> None:
    assert set(module.KINDS) == {op for op, attributes in OPS.items() if "channels" in attributes}


@pytest.mark.parametrize("make", [Plain, lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Hardtanh())])
def test_the_engine_comes_first_and_its_peers_are_compared_with_it(make, tmp_path) -> None:
    path = tmp_path / "m.lowbit"
    lowbit.export(quantized(make()), IMAGES).save(path)
    before = torch.get_num_threads()
    result = bench(path, batch=2, threads=2, against=["torch"])
    assert [row.name.split()[0] for row in result.rows] == ["lowbit", "torch", "torch", "torch"]
    assert result.rows[0].ratio == 1
    assert result.rows[1].ratio == pytest.approx(result.rows[1].milliseconds / result.rows[0].milliseconds)
    assert (result.threads, result.batch) == (2, 2)
    assert result.to_dict()["rows"][0]["milliseconds"] > 0
    assert torch.get_num_threads() == before


def test_the_twin_has_the_shape_of_the_network() -> None:
    packed = lowbit.export(chain(nn.MaxPool2d(2)), IMAGES).packed
    twin = peers.float_twin(packed)
    assert twin(IMAGES).shape == (2, 4)
    assert sum(isinstance(m, nn.Conv2d) for m in twin.modules()) == 4


@pytest.mark.parametrize("name", pretrained.names())
def test_networks_of_the_package_have_twins(name: str) -> None:
    packed = read(pretrained.find(name))
    twin = peers.float_twin(packed)
    assert twin(torch.zeros(2, *packed.input_shape)).shape == (2, 10)
    layers = Counter(type(m) for m in twin.modules())
    assert layers[nn.PReLU] == sum(op["op"] == "prelu" for op in packed.ops)
    assert layers[nn.BatchNorm2d]
    # An 8-bit convolution that writes codes has the network's own ReLU in its thresholds.
    own = sum(
        op["op"] == "relu" or (op["op"] == "quant_conv2d" and "thresholds" in packed.op_tensors(index))
        for index, op in enumerate(packed.ops)
    )
    of_signs = layers[nn.ReLU] - own
    assert bool(of_signs) != bool(layers[nn.PReLU]), "a sign behind a PReLU asks for no ReLU"


@pytest.mark.parametrize("rest", ["float", "int8"])
@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("poolnet", "reactnet", {"shifts": False}),
        ("poolnet", "bireal", {}),
        ("patchnet", "dorefa", {}),
        ("resnet20", "bireal", {}),
        ("resnet20", "irnet", {}),
    ],
)
def test_the_twin_of_a_residual_net_has_its_norms_pools_and_slopes(
    name: str, method: str, options: dict[str, Any], rest: str
) -> None:
    images = torch.randn(2, 3, 32, 32)
    model = models.create(name, method=lowbit.methods.registry[method](**options))
    if rest == "int8":
        models.quantize_rest_(model, {"name": "affine", "options": {}})
    model(images)
    packed = lowbit.export(model.eval(), images).packed
    twin = peers.float_twin(packed)
    assert twin(images).shape == (2, 10)
    kinds = nn.BatchNorm2d, nn.MaxPool2d, nn.PReLU | PReLU
    counted, expected = ([sum(isinstance(m, kind) for m in net.modules()) for kind in kinds] for net in (twin, model))
    assert counted == expected


def test_another_block_s_norm_is_not_what_codes_are_made_of() -> None:
    """In front of a binary and of a float convolution, each behind a norm of its own."""

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left = nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
            self.right = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
            self.last = nn.Conv2d(8, 4, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.last(self.left(x) + self.right(x)).flatten(1)

    model = Fork()
    floats = dict.fromkeys(("stem", "right.1", "last"))
    lowbit.quantize_(model, "xnor_net", {**floats, "left.1": "xnor_net"})
    twin = peers.float_twin(lowbit.export(awkward_(model), IMAGES).packed)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in twin.modules()) == 2


def test_the_twin_of_a_net_with_k_maps_or_tables_is_the_plain_float_net() -> None:
    """No mean, no product, and no batch norm that only the K map reads."""

    def layers(twin: nn.Module) -> list[type]:
        return [type(m) for m in twin.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]

    plain = chain(nn.BatchNorm2d(7))
    expected = layers(peers.float_twin(lowbit.export(plain, IMAGES).packed))
    for layer in (plain[2], plain[4]):
        layer.k_map = True
    twin = peers.float_twin(lowbit.export(plain, IMAGES).packed)
    assert layers(twin) == expected
    assert twin(IMAGES).shape == (2, 4)
    for layer in (plain[2], plain[4]):
        layer.k_map, layer.activation_quantizer = False, HalfWave(2, "lloyd_max")
    result = bench(lowbit.export(plain, IMAGES).packed, against=["torch"])
    assert len(result.rows) == 4


def test_every_form_of_every_peer_computes_the_twin() -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime (`pip install 'lowbit[bench]'`)")
    pytest.importorskip("openvino", reason="needs openvino (`pip install 'lowbit[bench]'`)")
    images = IMAGES.numpy()
    twin = peers.float_twin(lowbit.export(chain(nn.MaxPool2d(2)), IMAGES).packed)
    expected = twin(IMAGES).detach().numpy()
    seen = set()
    for peer in ("torch", "onnxruntime", "openvino"):
        for name, call in peers.runners([peer], twin, images, 1).items():
            outputs: Any = call()
            outputs = np.asarray(outputs.float() if peer == "torch" else outputs[0])
            _, _, form = name.partition(" ")[2].partition(" ")
            error = np.abs(outputs - expected).max() / np.abs(expected).max()
            assert error < (0.2 if "int8" in form or "bf16" in form else 1e-4), name
            seen.add((peer, form.split(",")[0]))
    assert {(peer, "float32") for peer in ("torch", "onnxruntime", "openvino")} <= seen
    assert {("onnxruntime", "int8"), ("openvino", "int8")} <= seen


@pytest.mark.parametrize("method", ["float", "xnor_net", "bnn", "dorefa", "twn"])
def test_the_twin_of_a_residual_net_has_the_layers_of_the_float_net(method: str) -> None:
    """One batch norm to a convolution, though codes are also made of sums of what was normalised before."""

    def counts(model: nn.Module) -> dict[str, int]:
        kinds = {"conv": nn.Conv2d, "norm": nn.BatchNorm2d, "pool": nn.MaxPool2d}
        return {name: sum(isinstance(m, kind) for m in model.modules()) for name, kind in kinds.items()}

    images = torch.randn(1, 3, 33, 33)
    options = {"width": 1 / 32, "image_size": 33, "stem": "imagenet"}
    packed = lowbit.export(models.create("resnet18", method=method, **options).eval(), images).packed
    found, wanted = counts(peers.float_twin(packed)), counts(models.create("resnet18", **options))
    # That of the last layer.
    wanted["norm"] += method == "bnn"
    assert found == wanted


def test_unknown_and_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lowbit.export(chain(), IMAGES).packed
    with pytest.raises(UsageError, match="no peer is called 'tvm'; choose from torch, onnxruntime, openvino"):
        bench(packed, against=["tvm"])
    with pytest.raises(UsageError, match="the batch size is 0"):
        bench(packed, batch=0)

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match="to bench against openvino, install torch: pip install torch"):
        bench(packed, against=["openvino"])


def test_calls_take_turns_and_quick_ones_come_in_a_row() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(module.TURN_SECONDS)

    seconds = interleaved_medians({"quick": lambda: order.append("quick"), "slow": slow}, seconds=0)
    assert set(seconds) == {"quick", "slow"}
    assert [(name, len(list(calls))) for name, calls in itertools.groupby(order)][-4:] == [
        ("quick", module.CALLS_A_TURN),
        ("slow", 1),
    ] * 2


def test_waiting_for_a_processor_makes_the_result_disturbed() -> None:
    """A busy machine lengthens long calls more than short ones: the ratio is wrong, and the result must say so."""
    engine, waiting = Row("lowbit", 1.0, 1.0, 1.0), Row("torch", 90.0, 24.0, 90.0)
    result = BenchResult("m", "scalar", 1, 1, (engine, waiting))
    assert (engine.interrupted, waiting.interrupted, result.disturbed) == (False, True, True)
    assert result.to_dict()["disturbed"] is True
    wall, cpu, _ = module._medians({"sleep": lambda: time.sleep(0.01)}, seconds=0)["sleep"]
    assert wall > 5 * cpu


def test_torch_runner_runs_the_model() -> None:
    assert torch_runner(nn.Flatten(), (3, 4, 4), batch=2)().shape == (2, 48)


def test_the_engine_alone_is_timed_without_torch() -> None:
    script = "import sys; import lowbit.exporter.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)

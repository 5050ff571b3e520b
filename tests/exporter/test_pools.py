"""Max-pools that move in front of norms and activations, where what these make is read in float."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import checked, ops
from nets import awkward_
from torch import Tensor, nn

import lowbit
from lowbit.exporter import Export, peers
from lowbit.methods import registry

IMAGES = torch.randn(6, 3, 17, 17, generator=torch.Generator().manual_seed(2))
POOL = (3, 2, 1)


class Stem(nn.Module):
    """What the stem makes is read by a binary convolution and by the shortcut around it."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *between)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.conv(x) + x).mean((2, 3)))


class ReadTwice(Stem):
    """The norm is read in front of the pool, too."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, pool = self.stem
        x = norm(conv(x))
        y = pool(x)
        return self.head((self.conv(y) + y).mean((2, 3)) + x.mean((2, 3)))


def exported(model: nn.Module, rest: bool) -> Export:
    """Checked against torch, by the NumPy interpreter and the engine."""
    lowbit.quantize_(model, "xnor_net")
    awkward_(model)
    if rest:
        lowbit.quantize_(model, registry["affine"](observer="min_max"))
        lowbit.calibrate(model, [IMAGES])
    return checked(model.eval(), IMAGES)[0]


CHAINS = {
    "norm": ([nn.BatchNorm2d(8)], ["affine"]),
    "norm and relu": ([nn.BatchNorm2d(8), nn.ReLU()], ["affine", "relu"]),
    "two norms": ([nn.BatchNorm2d(8), nn.Hardtanh(-1, 2), nn.BatchNorm2d(8)], ["affine", "hardtanh", "affine"]),
    "norm without weights": ([nn.BatchNorm2d(8, affine=False), nn.LeakyReLU(0.1)], ["affine", "prelu"]),
}


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(("between", "kinds"), CHAINS.values(), ids=CHAINS)
def test_a_pool_moves_to_its_convolution(between: list[nn.Module], kinds: list[str], rest: bool) -> None:
    """Behind norms of every sign; the channels that fall take the minimum."""
    model = Stem(*between, nn.MaxPool2d(*POOL))
    found = exported(model, rest)
    packed, values = found.packed, found.packed.values()
    (pool,) = (n for n, kind in enumerate(ops(found)) if kind == "max_pool")
    (source,) = packed.ops[pool]["inputs"]
    assert packed.ops[source - 1]["source"] == "stem.0"
    signs = [m.weight.detach().sign() for m in model.stem if isinstance(m, nn.BatchNorm2d) and m.affine]
    falling = packed.tensors[f"{pool}.falling"]
    np.testing.assert_array_equal(falling, sum((sign < 0).int() for sign in signs) % 2 if signs else np.zeros(8))
    assert len(signs) == 0 or 0 < falling.sum() < 8
    after = [op for op in packed.ops[pool + 1 :] if op["source"].startswith("stem.")]
    assert [op["op"] for op in after] == kinds
    assert {values[packed.ops.index(op) + 1].shape for op in after} == {(5, 5, 8)}
    # With an 8-bit stem codes are exact: they are made of what the pool takes of its sums.
    reads = next(op["inputs"] for op in packed.ops if op["op"] == "threshold" and op["source"] == "conv")
    assert reads == ([pool + 1] if rest else [pool + 1 + len(kinds)])


@pytest.mark.parametrize("rest", [False, True])
def test_a_pool_stays_behind_what_bends_or_is_read_elsewhere(rest: bool) -> None:
    bends = Stem(nn.BatchNorm2d(8), nn.PReLU(8), nn.BatchNorm2d(8), nn.MaxPool2d(*POOL))
    with torch.no_grad():
        bends.stem[2].weight[3] = -0.5
    found = [op for op in exported(bends, rest).packed.ops if op["source"].startswith("stem.")]
    assert [op["source"] for op in found if op["op"] in ("prelu", "max_pool", "affine")] == [
        "stem.1",
        "stem.2",
        "stem.4",
        "stem.3",
    ]
    twice = exported(ReadTwice(nn.BatchNorm2d(8), nn.MaxPool2d(*POOL)), rest)
    *_, float_pool = (n for n, kind in enumerate(ops(twice)) if kind == "max_pool")
    assert twice.packed.values()[float_pool + 1].kind == "float"
    assert "falling" not in twice.packed.op_tensors(float_pool)
    # Codes of sums are pooled by themselves then, and the float network has the one pool.
    pools = sum(isinstance(module, nn.MaxPool2d) for module in peers.float_twin(twice.packed).modules())
    assert (ops(twice).count("max_pool"), pools) == (2 if rest else 1, 1)


@pytest.mark.parametrize("rest", [False, True])
def test_the_float_twin_has_its_pool_where_the_network_has_it(rest: bool) -> None:
    """Behind the norm, which other runtimes make a part of the convolution."""
    model = Stem(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(*POOL))
    twin = peers.float_twin(exported(model, rest).packed)
    seen: list[str] = []
    for module in twin.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.MaxPool2d):
            module.register_forward_hook(lambda m, _, y: seen.append(f"{type(m).__name__} {y.shape[-1]}"))
    twin(IMAGES)
    assert seen[:4] == ["Conv2d 9", "BatchNorm2d 9", "ReLU 9", "MaxPool2d 5"]


class Flat(nn.Module):
    """Norms of one block: what the first makes is read by the second and by an addition."""

    def __init__(self, *pools: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.pools = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sequential(*pools)
        self.second, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3)
        self.end = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pools(self.norm(self.stem(x)))
        return self.end(self.head(self.conv(self.second(x)) + x))


TWO = [nn.MaxPool2d(2, 1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2)]


@pytest.mark.parametrize("k_map", [False, True])
@pytest.mark.parametrize("pools", [[nn.MaxPool2d(*POOL)], TWO], ids=["one", "two"])
def test_the_twin_of_several_pools_writes_as_many_numbers(pools: list[nn.Module], k_map: bool) -> None:
    """The last pool, which is the output, is moved too."""
    model = Flat(*pools)
    lowbit.quantize_(model, "xnor_net")
    model.conv.k_map = k_map
    packed = checked(awkward_(model), IMAGES)[0].packed
    assert packed.ops[-1]["op"] == "relu"
    assert peers.float_twin(packed)(IMAGES).shape == (len(IMAGES), packed.values()[-1].elements)

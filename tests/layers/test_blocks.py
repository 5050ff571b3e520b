"""The order of the parts of each block, as the papers have it."""

from __future__ import annotations

import pytest
from torch import nn

from lowbit.layers import PReLU, RPReLU
from lowbit.layers.blocks import BLOCKS

FLOAT = "dropout conv norm act pool"
# block: parts of a first, a middle and a last layer; the norm's width is the number after it
ORDERS = {
    "conv_bn_act": (FLOAT, FLOAT, "dropout conv"),
    "conv_act": ("dropout conv act pool", "dropout conv act pool", "dropout conv"),
    "conv_pool_bn": ("dropout conv pool norm", "dropout conv pool norm", "dropout conv pool norm"),
    "conv_pool_bn_act": (
        "dropout conv pool norm act",
        "dropout conv pool norm act",
        "dropout conv pool norm",
    ),
    "conv_pool_bn_hardtanh": ("dropout conv pool norm act", "dropout conv pool norm act", "dropout conv"),
    "conv_pool_act": ("dropout conv pool act", "dropout conv pool act", "dropout conv"),
    "conv_pool_bn_float_last": ("dropout conv pool norm", "dropout conv pool norm", "act dropout conv"),
    "conv_bn": ("dropout conv pool norm", "dropout conv pool norm", "dropout conv"),
    "shift_conv_bn_prelu": ("dropout conv pool norm act", "shift dropout conv pool norm act", "dropout conv"),
    "shift_conv_bn_rprelu": ("dropout conv pool norm act", "shift dropout conv pool norm act", "dropout conv"),
    "bn_act_conv": (FLOAT, "norm dropout conv pool", "norm act dropout conv pool"),
    "bn_act_conv_relu": (FLOAT, "norm dropout conv act pool", "norm act dropout conv pool"),
}


def test_every_block_is_here():
    assert set(ORDERS) == set(BLOCKS)


@pytest.mark.parametrize(("position", "role"), list(enumerate(("first", "middle", "last"))))
@pytest.mark.parametrize("name", ORDERS)
def test_order(name, position, role):
    conv, pool = nn.Conv2d(3, 5, 1), nn.MaxPool2d(2)
    block = BLOCKS[name](conv, pool=pool, dropout=0.25, role=role)
    parts = [part for part, _ in block.named_children()]
    assert parts == ORDERS[name][position].split()
    assert block.conv is conv
    assert block.dropout.p == 0.25
    if "pool" in parts:
        assert block.pool is pool
    if "act" in parts:
        acts = {"hardtanh": nn.Hardtanh, "prelu": PReLU, "rprelu": RPReLU}
        assert isinstance(block.act, acts.get(name.rpartition("_")[2], nn.ReLU))
    if "norm" in parts:
        assert block.norm.num_features == (5 if parts.index("norm") > parts.index("conv") else 3)


@pytest.mark.parametrize("name", ORDERS)
def test_without_pool_and_dropout(name):
    parts = [part for part, _ in BLOCKS[name](nn.Conv2d(3, 5, 1)).named_children()]
    assert parts == [part for part in ORDERS[name][1].split() if part not in ("pool", "dropout")]


def test_the_block_of_wage_has_no_bias():
    assert BLOCKS["conv_pool_act"](nn.Conv2d(3, 5, 1)).conv.bias is None

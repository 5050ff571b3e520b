"""The orders in which papers put convolution, batch norm, activation and pooling.

A block is made of a convolution, the pooling that follows it, and the dropout in front. The quantizer of a low-bit
layer is the activation of its block: it sits inside the layer, in front of the convolution, and the dropout moves
behind it (`lowbit.quantize_`). ``role`` says whether the layer is the network's first (it reads the image), its last
(it gives the classes) or in the middle. A dense layer is a convolution whose kernel is the whole map, so there is one
kind of block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, TypeAlias

from torch import nn

from lowbit.layers.activations import PReLU, RPReLU, Shift

Role: TypeAlias = Literal["first", "middle", "last"]
Block: TypeAlias = Callable[..., nn.Sequential]


def conv_bn_act(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Dropout, convolution, batch norm, ReLU, pooling: the usual order of float networks.

    The last layer stands alone behind its dropout.
    """
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    norm = nn.BatchNorm2d(conv.out_channels)
    return _sequence(dropout=_dropout(dropout), conv=conv, norm=norm, act=nn.ReLU(), pool=pool)


def conv_act(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution with a bias, ReLU, pooling: `conv_bn_act` once its batch norms are folded.

    The last layer stands alone behind its dropout.
    """
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    if conv.bias is None:
        conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
    return _sequence(dropout=_dropout(dropout), conv=conv, act=nn.ReLU(), pool=pool)


def conv_pool_bn(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution, pooling, batch norm: what the next quantizer reads is normalised.

    The last layer too is followed by a batch norm. Order of BNN.
    """
    return _sequence(dropout=_dropout(dropout), conv=conv, pool=pool, norm=nn.BatchNorm2d(conv.out_channels))


def conv_pool_bn_act(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Dropout, convolution, pooling, batch norm, ReLU. Order of BinaryConnect.

    The last layer is followed by a batch norm alone, which gives outputs of binary weights without a scale their size.
    """
    norm, act = nn.BatchNorm2d(conv.out_channels), None if role == "last" else nn.ReLU()
    return _sequence(dropout=_dropout(dropout), conv=conv, pool=pool, norm=norm, act=act)


def conv_pool_bn_hardtanh(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution, pooling, batch norm, Hardtanh. Order of IR-Net and ReCU.

    The sign that follows is that of the batch norm; Hardtanh stops the gradient outside [-1, 1], and is what shortcuts
    and the last layer, which stands alone behind its dropout, read.
    """
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    norm = nn.BatchNorm2d(conv.out_channels)
    return _sequence(dropout=_dropout(dropout), conv=conv, pool=pool, norm=norm, act=nn.Hardtanh())


def conv_pool_act(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution, pooling, ReLU; neither batch norm nor bias. Order of WAGE.

    The convolution's bias is taken away. The last layer stands alone behind its dropout.
    """
    conv.bias = None
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    return _sequence(dropout=_dropout(dropout), conv=conv, pool=pool, act=nn.ReLU())


def conv_pool_bn_float_last(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution, pooling, batch norm. Order of DoReFa-Net and HWGQ.

    The last layer, which is float, has no batch norm behind it; in place of a quantizer a ReLU stands in front.
    """
    if role == "last":
        return _sequence(act=nn.ReLU(), dropout=_dropout(dropout), conv=conv)
    return conv_pool_bn(conv, pool=pool, dropout=dropout, role=role)


def conv_bn(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """(Quantizer,) dropout, convolution, pooling, batch norm. Order of Bi-Real Net.

    The last layer, which is float, stands alone behind its dropout.
    """
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    return conv_pool_bn(conv, pool=pool, dropout=dropout)


def shift_conv_bn_prelu(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Learned shift, (quantizer,) dropout, convolution, pooling, batch norm, PReLU: ReActNet with slopes alone.

    The first layer, which is float, has no shift; the last one, float too, stands alone behind its dropout.
    """
    return _shifted(PReLU, conv, pool, dropout, role)


def shift_conv_bn_rprelu(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Learned shift, (quantizer,) dropout, convolution, pooling, batch norm, RPReLU. Order of ReActNet.

    First and last layer as in `shift_conv_bn_prelu`.
    """
    return _shifted(RPReLU, conv, pool, dropout, role)


def bn_act_conv(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Batch norm, (quantizer,) dropout, convolution, pooling. Order of XNOR-Net.

    The first layer, which is float, is followed by batch norm and ReLU; the last one, float too, is preceded by them.
    """
    if role == "first":
        return conv_bn_act(conv, pool=pool, dropout=dropout, role=role)
    act = nn.ReLU() if role == "last" else None
    norm = nn.BatchNorm2d(conv.in_channels)
    return _sequence(norm=norm, act=act, dropout=_dropout(dropout), conv=conv, pool=pool)


def bn_act_conv_relu(
    conv: nn.Conv2d, *, pool: nn.Module | None = None, dropout: float = 0.0, role: Role = "middle"
) -> nn.Sequential:
    """Batch norm, (quantizer,) dropout, convolution, ReLU, pooling. Order of the NIN of 2018.

    First and last layer as in `bn_act_conv`.
    """
    if role != "middle":
        return bn_act_conv(conv, pool=pool, dropout=dropout, role=role)
    norm = nn.BatchNorm2d(conv.in_channels)
    return _sequence(norm=norm, dropout=_dropout(dropout), conv=conv, act=nn.ReLU(), pool=pool)


BLOCKS: dict[str, Block] = {
    f.__name__: f
    for f in (
        conv_bn_act,
        conv_act,
        conv_pool_bn,
        conv_pool_bn_act,
        conv_pool_bn_hardtanh,
        conv_pool_act,
        conv_pool_bn_float_last,
        conv_bn,
        shift_conv_bn_prelu,
        shift_conv_bn_rprelu,
        bn_act_conv,
        bn_act_conv_relu,
    )
}


def pooled_head(block: Block, channels: int, num_classes: int, pool: nn.Module) -> nn.Sequential:
    """The last layer in the order of ``block``, with ``pool`` over the whole map in front of its 1x1 convolution."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, part in block(nn.Conv2d(channels, num_classes, 1), role="last").named_children():
        if name == "conv":
            parts["pool"] = pool
        parts[name] = part
    return nn.Sequential(parts)


def mean_head(block: Block, channels: int, num_classes: int) -> nn.Sequential:
    """`pooled_head` with the mean."""
    return pooled_head(block, channels, num_classes, nn.AdaptiveAvgPool2d(1))


def _shifted(
    act: type[PReLU] | type[RPReLU], conv: nn.Conv2d, pool: nn.Module | None, dropout: float, role: Role
) -> nn.Sequential:
    if role == "last":
        return _sequence(dropout=_dropout(dropout), conv=conv)
    shift = Shift(conv.in_channels) if role == "middle" else None
    norm = nn.BatchNorm2d(conv.out_channels)
    return _sequence(
        shift=shift, dropout=_dropout(dropout), conv=conv, pool=pool, norm=norm, act=act(conv.out_channels)
    )


def _sequence(**parts: nn.Module | None) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, module) for name, module in parts.items() if module is not None))


def _dropout(probability: float) -> nn.Module | None:
    return nn.Dropout(probability) if probability else None

"""Residual networks: torchvision's topology, and where each block order puts sums, activations and codes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lowbit
from lowbit import methods, models
from lowbit.errors import UsageError
from lowbit.layers import PReLU, QuantizedLayer, Residual, RPReLU, Shortcut, quantized_layers
from lowbit.layers.blocks import BLOCKS


def parts(block: nn.Module) -> str:
    return " ".join(name for name, _ in block.named_children())


def residuals(model: nn.Module) -> list[Residual]:
    return [module for module in model.modules() if isinstance(module, Residual)]


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_the_float_network_is_torchvisions(name):
    ours = models.create(name, num_classes=10, image_size=224).eval()
    theirs = getattr(torchvision.models, name)(num_classes=10).eval()
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
    with torch.no_grad():
        for own, given in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            own.copy_(given.reshape(own.shape))
        images = torch.randn(2, 3, 65, 65)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcut", ["block", "conv"])
def test_resnet20_has_the_papers_size(shortcut):
    """0.27 million by table 6 of He et al.; without the convolutions that stand in for option A, 269,722."""
    model = models.create("resnet20", shortcut=shortcut)
    ways = [module for module in model.modules() if isinstance(module, Shortcut)]
    in_shortcuts = sum(parameter.numel() for way in ways for parameter in way.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) - in_shortcuts == 269_722
    assert sum(len(way) > 0 for way in ways) == 2
    assert len(residuals(model)) == (9 if shortcut == "block" else 18)


# block: parts of the stem, of the first and the last convolution of a branch, of a shortcut, of the head; the
# activation behind the sum
ORDERS = {
    "conv_bn_act": ("conv norm act", "conv norm act", "conv norm", "conv norm", "pool conv", nn.ReLU),
    "conv_act": ("conv act", "conv act", "conv", "conv", "pool conv", nn.ReLU),
    "conv_pool_bn": ("conv norm", "conv norm", "conv norm", "conv norm", "pool conv norm", nn.Identity),
    "conv_pool_bn_act": ("conv norm act", "conv norm act", "conv norm", "conv norm", "pool conv norm", nn.ReLU),
    "conv_pool_bn_hardtanh": ("conv norm act", "conv norm act", "conv norm", "conv norm", "pool conv", nn.Hardtanh),
    "conv_pool_act": ("conv act", "conv act", "conv", "conv", "pool conv", nn.ReLU),
    "conv_pool_bn_float_last": ("conv norm", "conv norm", "conv norm", "conv norm", "act pool conv", nn.Identity),
    "conv_bn": ("conv norm", "conv norm", "conv norm", "conv norm", "pool conv", nn.Identity),
    "shift_conv_bn_prelu": (
        "conv norm act",
        "shift conv norm act",
        "shift conv norm",
        "conv norm",
        "pool conv",
        PReLU,
    ),
    "shift_conv_bn_rprelu": (
        "conv norm act",
        "shift conv norm act",
        "shift conv norm",
        "conv norm",
        "pool conv",
        RPReLU,
    ),
    "bn_act_conv": ("conv norm act", "norm conv", "norm conv", "norm conv", "norm act pool conv", nn.Identity),
    "bn_act_conv_relu": ("conv norm act", "norm conv act", "norm conv", "norm conv", "norm act pool conv", nn.ReLU),
}


def test_every_block_is_here():
    assert set(ORDERS) == set(BLOCKS)


@pytest.mark.parametrize("name", ORDERS)
def test_where_a_block_order_puts_its_parts(name):
    stem, first, last, way, head, act = ORDERS[name]
    model = models.registry["resnet20"](BLOCKS[name], width=1 / 8)
    assert parts(model.stem) == stem
    assert parts(model.head) == head
    for unit in residuals(model):
        assert [parts(block) for block in unit.branch] == [first, last]
        assert [parts(block) for block in unit.shortcut] in ([], [way])
        assert type(unit.act) is act
    model = models.registry["resnet20"](BLOCKS[name], width=1 / 8, shortcut="conv")
    for unit in residuals(model):
        assert [parts(block) for block in unit.branch] == [last]
        assert [parts(block) or type(block).__name__ for block in unit.shortcut] in ([], ["AvgPool2d", way])
        assert type(unit.act) is act


@pytest.mark.parametrize("method", ["xnor_net", "bnn", "dorefa", "hwgq"])
def test_what_enters_a_stage_leaves_it_by_identity(method):
    """With shortcuts around each convolution, and branches that give 0; backwards too, where a branch passes none."""
    model = models.create("resnet20", method=method, width=1 / 4, shortcut="conv").eval()
    for unit in residuals(model):
        for norm in (module for module in unit.branch.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
        for layer in quantized_layers(unit.branch):
            nn.init.zeros_(layer.weight)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    y = model.stage1(x)
    assert torch.equal(y, x)
    wanted = torch.randn_like(y)
    y.backward(wanted)
    assert torch.equal(x.grad, wanted)
    for stage, side in ((model.stage2, 6), (model.stage3, 3)):
        first, *others = stage
        z = first(torch.randn(2, first.branch[0].conv.in_channels, side, side))
        assert torch.equal(nn.Sequential(*others)(z), z)


@pytest.mark.parametrize("shortcut", ["block", "conv"])
@pytest.mark.parametrize("method", ["xnor_net", "dorefa", "bnn", "affine", "wage", "twn"])
def test_which_layers_compute_on_codes(method, shortcut):
    made = methods.registry[method]()
    block = BLOCKS[made.block]
    model = models.registry["resnet20"](block, width=1 / 8, shortcut=shortcut)
    reports = {report.name: report for report in lowbit.quantize_(model, made)}
    of_shortcuts = [report for name, report in reports.items() if ".shortcut." in name]
    assert len(of_shortcuts) == 2
    for report in reports.values():
        left_out = (
            ("first layer" if made.skip_first and report.name == "stem.conv" else "")
            or ("last layer" if made.skip_last and report.name == "head.conv" else "")
            or ("shortcut" if made.skip_shortcuts and report in of_shortcuts else "")
        )
        assert report.note == left_out
        assert report.bits_w == (32 if left_out else made.bits_w)


def test_a_shortcut_is_made_low_bit_by_an_override():
    model = models.registry["resnet20"](BLOCKS["bn_act_conv"], width=1 / 8)
    lowbit.quantize_(model, "xnor_net", overrides={"*.shortcut.*": "xnor_net"})
    layers = [m for way in model.modules() if isinstance(way, Shortcut) for m in way.modules() if hasattr(m, "weight")]
    assert [isinstance(layer, QuantizedLayer) for layer in layers if isinstance(layer, nn.Conv2d)] == [True, True]


@pytest.mark.parametrize("shortcut", ["block", "conv"])
@pytest.mark.parametrize("side", [8, 9, 11, 15, 33])
def test_sides_are_halved_and_rounded_up(side, shortcut):
    model = models.create("resnet18", width=1 / 32, image_size=side, shortcut=shortcut).eval()
    sides: list[int] = []

    def note(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        sides.append(result.shape[-1])

    for stage in (model.stage1, model.stage2, model.stage3, model.stage4):
        stage.register_forward_hook(note)
    model(torch.randn(1, 3, side, side))
    assert sides == [side, -(-side // 2), -(-side // 4), -(-side // 8)]


def test_a_mean_at_an_odd_edge_counts_what_is_there():
    pool = models.create("resnet20", image_size=5, width=1 / 16, shortcut="conv").stage2[0].shortcut[0]
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert torch.equal(pool(x)[0, 0], torch.tensor([[0.0, 1.5, 3.5], [7.5, 9.0, 11.0], [17.5, 19.0, 21.0]]))


@pytest.mark.parametrize(("side", "stem"), [(32, "cifar"), (64, "cifar"), (65, "imagenet"), (224, "imagenet")])
def test_the_stem_follows_the_image(side, stem):
    kernels = {"cifar": ((3, 3), (1, 1), False), "imagenet": ((7, 7), (2, 2), True)}
    for given in ({}, {"stem": stem}, {"stem": "imagenet"}):
        model = models.create("resnet18", width=1 / 32, image_size=side, **given)
        found = model.stem.conv.kernel_size, model.stem.conv.stride, hasattr(model.stem, "pool")
        assert found == kernels[given.get("stem", stem)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"image_size": 7}, "needs images of at least 8x8, not 7x7"),
        ("resnet18", {"image_size": 31, "stem": "imagenet"}, "needs images of at least 32x32, not 31x31"),
        ("resnet20", {"image_size": 3}, "needs images of at least 4x4, not 3x3"),
        ("resnet34", {"stem": "cifar10"}, "stem of a ResNet is 'cifar10'"),
        ("resnet34", {"shortcut": "none"}, "shortcut of a ResNet is 'none'"),
        ("resnet20", {"stem": "cifar"}, "model 'resnet20' has no option 'stem'; its options: width, shortcut"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(UsageError, match=message):
        models.create(name, **options)

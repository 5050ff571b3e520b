"""The networks have the shapes and parameter counts of their sources; weights load whole or not at all."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowbit import methods, models
from lowbit.errors import LowbitError, UsageError
from lowbit.layers import QuantizedLayer
from lowbit.layers.activations import RPReLU
from lowbit.models.base import load_weights
from lowbit.training.whitening import freeze_first_layer_

# name, options: parameters of the float network; convolutions and dense layers
PARAMETERS: dict[str, tuple[dict[str, Any], int, int]] = {
    # The usual CIFAR-10 VGGs with batch norm have 9,231,114, 9,416,010, 14,728,266 and 20,040,522 parameters; ours have
    # no biases in front of batch norm: one less per channel.
    "vgg11": ({}, 9_231_114 - 2_752, 9),
    "vgg13": ({}, 9_416_010 - 2_944, 11),
    "vgg16": ({}, 14_728_266 - 4_224, 14),
    "vgg19": ({}, 20_040_522 - 5_504, 17),
    "vgg_small": ({}, 27 * 128 + 9 * (128**2 + 128 * 256 + 256**2 + 256 * 512 + 512**2) + 2 * 1792 + 81_930, 7),
    # Network in Network for CIFAR-10 has 966,986; batch norm adds 2 per channel.
    "nin": ({}, 966_986 + 2 * 1_408, 9),
    # Caffe's LeNet for 28x28 grey images has 431,080; batch norm adds 2 per channel.
    "lenet": ({"in_channels": 1, "image_size": 28}, 431_080 + 2 * 570, 4),
    "patchnet": (
        {},
        48 * 128 + 9 * (128**2 + 128 * 256 + 2 * 256**2 + 256 * 512 + 2 * 512**2) + 2 * (256 + 768 + 1536) + 5_130,
        9,
    ),
    "airbench": (
        {},
        12 * 24 + 9 * (24 * 64 + 64**2 + 64 * 256 + 3 * 256**2) + 2 * (2 * 64 + 4 * 256) + 2 * 256 + 2_570,
        8,
    ),
    "poolnet": ({}, 27 * 54 + 54 * 64 + 9 * (64 * 256 + 3 * 256**2) + 2 * (64 + 4 * 256) + 2_570, 7),
    # torchvision's, for ImageNet.
    "resnet18": ({"num_classes": 1000, "image_size": 224}, 11_689_512, 21),
    "resnet34": ({"num_classes": 1000, "image_size": 224}, 21_797_672, 37),
    # The usual ResNet-20 has 269,722 with zeros as padding; here the shortcuts have a convolution and a batch norm.
    "resnet20": ({}, 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64), 22),
}
TINY: dict[str, Any] = {"width": 1 / 32}


def tiny(name: str, **given: Any) -> nn.Module:
    options = {key: value for key, value in TINY.items() if key in models.registry.options(name)}
    return models.create(name, **options, **given)


def test_every_model_is_counted():
    assert set(PARAMETERS) == set(models.registry)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    options, count, layers = PARAMETERS[name]
    with torch.device("meta"):
        model = models.create(name, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == layers


@pytest.mark.parametrize("name", list(models.registry))
def test_options_are_documented_and_have_defaults(name):
    documentation = inspect.getdoc(models.registry[name]) or ""
    assert documentation
    for option in models.registry.options(name).values():
        assert option.default is not inspect.Parameter.empty
        assert f"``{option.name}``" in documentation


@pytest.mark.parametrize(("classes", "channels", "side"), [(10, 3, 32), (1, 1, 32), (100, 4, 64)])
@pytest.mark.parametrize("name", list(models.registry))
def test_shapes(name, classes, channels, side):
    model = tiny(name, num_classes=classes, in_channels=channels, image_size=side).eval()
    with torch.no_grad():
        assert model(torch.randn(2, channels, side, side)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        ("vgg16", 28, "halves its map 5 times: image size 28 must be a multiple of 32"),
        ("vgg11", 16, "must be a multiple of 32"),
        ("vgg19", 0, "must be a multiple of 32"),
        ("vgg13", -32, "must be a multiple of 32"),
        ("vgg_small", 28, "halves its map 3 times: image size 28 must be a multiple of 8"),
        ("lenet", 15, "lenet needs images of at least 16x16, not 15x15"),
        ("patchnet", 7, "patchnet needs images of at least 8x8, not 7x7"),
        ("poolnet", 7, "poolnet needs images of at least 8x8, not 7x7"),
        ("airbench", 8, "airbench needs images of at least 9x9, not 8x8"),
        ("nin", 7, "nin needs images of at least 8x8, not 7x7"),
    ],
)
def test_wrong_image_sizes(name, side, message):
    with pytest.raises(UsageError, match=message):
        models.create(name, image_size=side)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vgg_small", 8),
        ("lenet", 16),
        ("lenet", 17),
        ("nin", 8),
        ("nin", 9),
        ("patchnet", 8),
        ("patchnet", 11),
        ("poolnet", 8),
        ("poolnet", 11),
        ("airbench", 9),
        ("airbench", 12),
    ],
)
def test_smallest_and_odd_image_sizes(name, side):
    model = tiny(name, image_size=side).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side)).shape == (1, 10)


@pytest.mark.parametrize("side", [8, 9, 32])
def test_a_pooled_stem_halves_the_map_like_patches(side):
    first = [tiny("patchnet", image_size=side, stem=stem).stem for stem in ("patches", "pooled")]
    images = torch.randn(2, 3, side, side)
    assert {tuple(stem(images).shape[2:]) for stem in first} == {(side // 2, side // 2)}
    assert [tuple(stem.conv.kernel_size) for stem in first] == [(4, 4), (3, 3)]
    assert tiny("patchnet", method="reactnet", image_size=side, stem="pooled")(images).shape == (2, 10)


@pytest.mark.parametrize(
    ("method", "act"),
    [("float", nn.ReLU), ("affine", nn.ReLU), ("irnet", nn.Hardtanh), ("reactnet", RPReLU), ("bireal", nn.Identity)],
)
def test_the_activation_of_poolnet_stands_behind_every_sum(method, act):
    model = tiny("poolnet", method=method)
    assert [type(model.get_submodule(f"unit{number}").act) for number in range(1, 5)] == [act] * 4
    inside = [module for number in range(1, 5) for module in model.get_submodule(f"unit{number}").branch.modules()]
    assert not any(isinstance(module, (nn.ReLU, nn.Hardtanh, RPReLU)) for module in inside)


def test_nothing_behind_poolnets_frozen_first_layer_needs_a_gradient_but_what_learns():
    model = tiny("poolnet", method="reactnet")
    freeze_first_layer_(model)
    images = torch.randn(2, 3, 32, 32)
    patches = model.stem[:3](images)
    assert not patches.requires_grad
    assert model.stem[3:](patches).requires_grad


def test_convolutions_of_airbench_start_as_the_identity_on_what_they_read():
    model = models.create("airbench")
    images = torch.randn(2, 24, 7, 7)
    assert torch.equal(model.pair1[0].conv(images)[:, :24], images)
    assert model.pair1[0].conv.weight[24:].std() > 0


@pytest.mark.parametrize(("method", "zeros"), [("float", True), ("twn", True), ("bwn", False), ("reactnet", False)])
def test_binary_weights_start_with_signs(method, zeros):
    assert bool((models.create("airbench", method=method).pair2[1].conv.weight == 0).any()) == zeros


def test_binary_models_can_be_made_without_values():
    with torch.device("meta"):
        assert models.create("airbench", method="bwn").pair2[1].conv.weight.is_meta


@pytest.mark.parametrize(("method", "norms"), [("float", 1), ("xnor_net", 1), ("wage", 0)])
def test_the_last_layer_of_airbench_reads_small_numbers_where_blocks_have_norms(method, norms):
    found = [part for part in tiny("airbench", method=method).head.pool if isinstance(part, nn.BatchNorm2d)]
    assert [float(norm.weight.detach().unique()) for norm in found] == pytest.approx([0.2] * norms)


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("vgg", {}, "no model is called 'vgg': did you mean"),
    ("vgg16", {"depth": 3}, "model 'vgg16' has no option 'depth'; its options: width"),
    ("vgg16", {"block": None}, "model 'vgg16' has no option 'block'"),
    ("nin", {"wdith": 2}, "model 'nin' has no option 'wdith'; its options: dropout, width"),
    ("vgg16", {"method": "bin"}, "no method is called 'bin'"),
    ("vgg16", {"method": "xnor_net", "method_options": {"alpha": 1}}, "method 'xnor_net' has no option 'alpha'"),
    ("vgg16", {"method": "float", "method_options": {"alpha": 1}}, "its options: none"),
    ("vgg16", {"method": "xnor_net", "method_options": {"gradient": "x"}}, r"gradient of alpha \* sign\(W\) is 'x'"),
    (
        "vgg16",
        {"method": methods.registry["bnn"](), "method_options": {"alpha": 1}},
        "method_options go with a method's name",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(UsageError, match=message):
        models.create(name, **options)


def test_width_multiplies_every_width():
    model = models.create("vgg_small", width=0.25)
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert widths == [32, 32, 64, 64, 128, 128, 10]


def test_dropout_of_nin():
    def rates(dropout: float) -> list[float]:
        model = models.create("nin", dropout=dropout)
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert rates(0.25) == [0.25, 0.25]
    assert rates(0.0) == []


@pytest.mark.parametrize(
    ("method", "options", "quantized"),
    [("float", {}, 0), ("xnor_net", {"relu": True}, 7), ("bnn", {}, 9)],
)
def test_the_method_shapes_the_model(method, options, quantized):
    model = tiny("vgg11", method=method, method_options=options)
    assert sum(isinstance(module, QuantizedLayer) for module in model.modules()) == quantized
    assert model.method.name == method
    blocks = [[part for part, _ in block.named_children()] for block in list(model)[1:-2]]
    expected = {
        "float": ["conv", "norm", "act", "pool"],
        "xnor_net": ["norm", "conv", "act", "pool"],
        "bnn": ["conv", "pool", "norm"],
    }[method]
    assert all(block == [part for part in expected if part in block] for block in blocks)
    assert {part for block in blocks for part in block} == set(expected)


def test_a_method_made_already():
    method = methods.registry["xnor_net"](relu=True)
    assert tiny("lenet", method=method).method is method


@pytest.fixture
def trained(tmp_path):
    """A small network and the file of its weights."""
    torch.manual_seed(1)
    model = tiny("lenet", method="xnor_net")
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_weights_come_back(trained):
    model, path = trained
    torch.manual_seed(2)
    other = tiny("lenet", method="xnor_net")
    load_weights(other, path)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def _missing(path, state):
    path.unlink()


def _garbage(path, state):
    path.write_bytes(b"no weights at all")


def _empty(path, state):
    path.write_bytes(b"")


def _folder(path, state):
    path.unlink()
    path.mkdir()


def _without(path, state):
    del state["3.conv.bias"]
    save_file(state, path)


def _spare(path, state):
    save_file({**state, "a.spare": torch.zeros(1)}, path)


def _shape(path, state):
    save_file({**state, "3.conv.bias": torch.zeros(11)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "does not exist: it was taken away, or the run has not finished"),
        (_garbage, "is no safetensors file"),
        (_empty, "is no safetensors file"),
        (_folder, "is no safetensors file"),
        (_without, "does not fit the model: tensor '3.conv.bias' and 0 more differ"),
        (_spare, "does not fit the model: tensor 'a.spare'"),
        (_shape, "does not fit the model: tensor '3.conv.bias'"),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_alone(trained, damage, message):
    model, path = trained
    damage(path, dict(model.state_dict()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LowbitError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())

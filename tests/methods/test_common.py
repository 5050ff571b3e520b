"""What every registered method promises, checked for whatever is registered, with each of its options."""

from __future__ import annotations

import copy
import inspect
import re
import typing
from typing import Any

import pytest
import torch
from pairs import pairs
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional

from lowbit import methods, models
from lowbit.convert import quantize_
from lowbit.layers import attach_rules, quantized_layers
from lowbit.layers.blocks import BLOCKS
from lowbit.methods import Method
from lowbit.models.base import load_weights
from lowbit.quantizers.base import Grid, Quantizer
from lowbit.training.module import make_optimizer
from lowbit.training.schedules import multiplier
from lowbit.training.settings import check_recipe

pytestmark = pytest.mark.filterwarnings("ignore:an activation quantizer has seen no data")

NAMES = list(methods.registry)


def variants(name: str) -> list[dict[str, Any]]:
    """The default options, and every other value of each option that has a few."""
    result: list[dict[str, Any]] = [{}]
    for option in methods.registry.options(name).values():
        values = (False, True) if option.annotation is bool else ()
        if typing.get_origin(option.annotation) is typing.Literal:
            values = typing.get_args(option.annotation)
        result += [{option.name: value} for value in values if value != option.default]
    return result


METHODS = {f"{name}{options or ''}": methods.registry[name](**options) for name in NAMES for options in variants(name)}
QUANTIZERS = {
    f"{key} {side}": getattr(method, side)
    for key, method in METHODS.items()
    for side in ("weight", "activation")
    if getattr(method, side) is not None
}
SMALL = {"width": 1 / 16}
SIDES = {"vgg_small": 16, "lenet": 16, "airbench": 9} | dict.fromkeys(
    ("nin", "resnet18", "resnet20", "resnet34", "patchnet", "poolnet"), 8
)


def small(model: str, method: Method) -> nn.Module:
    """The model, as narrow as its options let it be."""
    options = {key: value for key, value in SMALL.items() if key in models.registry.options(model)}
    return models.create(model, num_classes=3, method=method, image_size=SIDES.get(model, 32), **options)


def pictures(model: str, count: int) -> Tensor:
    return torch.randn(count, 3, SIDES.get(model, 32), SIDES.get(model, 32))


def adam(network: nn.Module, method: Method, rate: float) -> torch.optim.Adam:
    """Adam at ``rate``; weights with an update rule of their own at its recipe's rate, which has the rule's unit."""
    ruled = [layer.weight for layer in quantized_layers(network) if layer.update is not None]
    others = [parameter for parameter in network.parameters() if all(parameter is not weight for weight in ruled)]
    groups = [{"params": others, "lr": rate}, {"params": ruled, "lr": method.recipe.learning_rate}]
    return torch.optim.Adam([group for group in groups if group["params"]])


def values() -> Tensor:
    """(4, 3, 5, 5) with zeros of both signs, the ends of the usual windows and numbers far outside."""
    x = torch.randn(4, 3, 5, 5)
    x.view(-1)[:10] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 100.0, -100.0, 1e-30, -1e-30])
    return x


@pytest.mark.parametrize("name", NAMES)
def test_options_are_documented_and_have_defaults(name):
    documentation = inspect.getdoc(methods.registry[name]) or ""
    assert documentation
    for option in methods.registry.options(name).values():
        assert option.default is not inspect.Parameter.empty
        assert re.search(rf"^ +{option.name}: \S", documentation, re.MULTILINE), f"Args: says nothing of {option.name}"


@pytest.mark.parametrize("key", METHODS)
def test_fields(key):
    method = METHODS[key]
    assert method.name in NAMES
    assert key.startswith(method.name)
    assert method.title
    assert method.paper
    assert method.block in BLOCKS
    for side, bits in (("weight", method.bits_w), ("activation", method.bits_a)):
        make = getattr(method, side)
        assert bits == (32 if make is None else make().bits)
    assert 1 <= method.bits_g <= 32
    if (method.bits_w, method.bits_a, method.bits_g) != (32, 32, 32):
        assert method.url.startswith("https://")
        assert "Source:" in (inspect.getdoc(methods.registry[method.name]) or "")


WITHOUT_PUBLISHED_RECIPE = {
    "float": "the twin of all the others is from no paper",
    "affine": "the whitepaper tunes trained networks, and no complete recipe of it was found",
    "fixed_point": "the papers tune trained networks, and no complete recipe of theirs was found",
    "quantized_nets": "neither the paper's settings nor its code were found",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_recipe_is_kept_beside_the_default(name):
    method = methods.registry[name]()
    assert ("paper" in method.recipes) != (name in WITHOUT_PUBLISHED_RECIPE)
    assert list(method.named_recipes) == ["default", *method.recipes]


@pytest.mark.parametrize("key", METHODS)
def test_recipes(key):
    method = METHODS[key]
    network = small("lenet", method)
    for recipe in method.named_recipes.values():
        check_recipe(recipe)
        assert recipe.source
        assert recipe.warmup < recipe.epochs
        assert list(recipe.milestones) == sorted(set(recipe.milestones))
        assert bool(recipe.milestones) == (recipe.schedule == "step")
        optimizer = make_optimizer(network, recipe)
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        assert held == set(network.parameters())
        assert any(group["weight_decay"] for group in optimizer.param_groups) == (recipe.weight_decay > 0)
        middles = [multiplier(recipe, epoch + 0.5) for epoch in range(recipe.epochs)]
        after = [rate for epoch, rate in enumerate(middles) if epoch + 0.5 > recipe.warmup]
        assert max(middles) <= 1
        assert min(middles) > 0
        assert after == sorted(after, reverse=True)
        assert after[0] > 0.95 * (1 - 1 / recipe.epochs)


@pytest.mark.parametrize("key", METHODS)
def test_a_network_can_be_saved_as_a_whole(key, tmp_path):
    network = small("lenet", METHODS[key]).eval()
    torch.save(network, tmp_path / "network.pt")
    again = torch.load(tmp_path / "network.pt", weights_only=False)  # our own file
    assert [type(module) for module in again.modules()] == [type(module) for module in network.modules()]


@pytest.mark.parametrize("key", QUANTIZERS)
def test_a_fresh_quantizer_for_each_layer(key):
    first, second = QUANTIZERS[key](), QUANTIZERS[key]()
    assert isinstance(first, Quantizer)
    assert first is not second


@pytest.mark.parametrize("key", QUANTIZERS)
def test_decoded_codes_are_the_fake_quantized_values(key):
    quantizer = QUANTIZERS[key]()
    x = values()
    quantizer(x)
    quantizer.eval()
    codes, grid = quantizer.encode(x)
    assert isinstance(grid, Grid)
    assert grid.bits == quantizer.bits
    assert isinstance(grid.multiplier, int)
    assert isinstance(grid.offset, int)
    assert grid.scale.dtype == torch.float32
    assert not grid.scale.requires_grad
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert int(codes.max()) < 2**quantizer.bits
    assert torch.equal(quantizer.decode(codes, grid), quantizer(x))
    values_of_codes = grid.integers(torch.arange(2**grid.bits)) if grid.levels is None else grid.levels
    assert quantizer.signed == bool((values_of_codes < 0).any())


@pytest.mark.parametrize("key", [key for key in QUANTIZERS if not key.endswith("weight")])
def test_layout_in_memory_is_kept(key):
    """Another one would cost the next convolution a copy."""
    quantizer = QUANTIZERS[key]()
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    q = quantizer(x)
    codes, _ = quantizer.eval().encode(x.detach())
    gradient = torch.autograd.grad(q, x, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))[0]
    assert {tensor.stride() for tensor in (q, codes, gradient)} == {x.stride()}


@pytest.mark.parametrize("key", QUANTIZERS)
def test_few_levels(key):
    """Over a tensor for activations, over each output filter for weights; both codes and values move with x."""
    quantizer = QUANTIZERS[key]()
    q = quantizer(values())
    for part in q if key.endswith("weight") else [q]:
        assert 2 <= part.unique().numel() <= 2**quantizer.bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", QUANTIZERS)
def test_gradients_are_finite(key, dtype):
    x = values().to(dtype).requires_grad_()
    q = QUANTIZERS[key]()(x)
    assert q.shape == x.shape
    assert q.dtype == dtype
    q.backward(torch.randn_like(q))
    assert x.grad.shape == x.shape
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    assert x.grad.count_nonzero() > 0


@torch.no_grad()
def is_taken_away(network, parameter, images) -> bool:
    """Whether a norm behind takes away what is added to a parameter: then rounding errors are all of its gradient."""
    logits = network(images)
    parameter += 1
    return parameter.grad is not None and torch.allclose(network(images), logits, atol=1e-4)


@pytest.mark.parametrize(("model", "key"), pairs(METHODS))
def test_a_training_step(model, key):
    """Every trainable parameter moves and stays finite; eval() then changes nothing and ignores the batch.

    It moves before the projection, which may round a small step away.
    """
    network = small(model, METHODS[key])
    optimizer = adam(network, METHODS[key], 1e-3)
    moved: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: moved.update(copy.deepcopy(dict(network.named_parameters()))))
    attach_rules(optimizer, network)
    images = pictures(model, 6)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    logits = network(images)
    assert logits.shape == (6, 3)
    functional.cross_entropy(logits, torch.arange(6) % 3).backward()
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(moved[name], before[name]) or is_taken_away(network, parameter, images), name

    network.eval()
    state = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert together.isfinite().all()
    # 34 layers of signs without scales give logits of 1e10, what is left of larger sums: the bound follows their size.
    size = max(1.0, float(together.abs().max())) if model == "resnet34" else 1.0
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5 * size)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("key", METHODS)
def test_saved_weights_give_the_same_outputs(key, tmp_path):
    method = METHODS[key]
    network = small("vgg_small", method)
    network(pictures("vgg_small", 4))
    network.eval()
    save_model(network, str(tmp_path / "model.safetensors"))
    other = small("vgg_small", method).eval()
    images = pictures("vgg_small", 2)
    with torch.no_grad():
        expected = network(images)
        assert not torch.equal(other(images), expected)
        load_weights(other, tmp_path / "model.safetensors")
        assert torch.equal(other(images), expected)


@pytest.mark.parametrize("key", METHODS)
def test_a_deep_copy_is_equal_and_apart(key):
    network = small("lenet", METHODS[key]).eval()
    twin = copy.deepcopy(network)
    images = pictures("lenet", 2)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(twin(images), expected)
        for parameter in twin.parameters():
            parameter.neg_()
        assert not torch.equal(twin(images), expected)
        assert torch.equal(network(images), expected)


def plain_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 2), nn.BatchNorm1d(2)
    )


@pytest.mark.parametrize("key", METHODS)
def test_a_plain_loop_learns(key):
    """Only quantize_, the method's start and attach_rules, on two classes told apart by the sign of the inputs' sum."""
    network = plain_network()
    reports = quantize_(network, METHODS[key])
    quantized = [report.name for report in reports if min(report.bits_w, report.bits_a) < 32]
    assert bool(quantized) == (METHODS[key].weight is not None or METHODS[key].activation is not None)
    for layer in quantized_layers(network) if METHODS[key].initialise else []:
        METHODS[key].initialise(layer.weight)
    optimizer = adam(network, METHODS[key], 0.01)
    attach_rules(optimizer, network)
    inputs = torch.randn(128, 8)
    labels = (inputs.sum(dim=1) > 0).long()
    quantizer, weight = getattr(network[2], "weight_quantizer", None), network[2].weight
    if quantizer is not None and not torch.equal(quantizer(weight), quantizer(weight)):
        pytest.skip("weights drawn at random drown 8 inputs in noise")
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        logits = network(inputs)
    assert functional.cross_entropy(logits, labels) < 0.5 * losses[0]
    assert (logits.argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("key", [key for key in METHODS if "stochastic" not in key])
def test_integers_in_eval_equal_fake_quantized_values_in_train(key):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Flatten(),
        nn.LayerNorm(8 * 36),
        nn.Linear(8 * 36, 5),
    )
    quantize_(network, METHODS[key])
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        trained = network.train()(images)
        assert torch.equal(network(images), trained)
        evaluated = network.eval()(images)
    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)

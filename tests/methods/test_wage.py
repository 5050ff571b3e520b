"""WAGE against NumPy oracles written from its formulas; whole trainings whose weights never leave their grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit import methods, models
from lowbit.convert import quantize_
from lowbit.errors import UsageError
from lowbit.layers import attach_rules, quantized_layers
from lowbit.methods.wage import initialise, layer_scale, quantize_error, shift, to_grid, update
from lowbit.training import TrainConfig, module, train
from lowbit.training.schedules import multiplier

Array = npt.NDArray[np.float64]


def oracle_integer(x: float, k: int) -> int:
    """Q(x, k) / sigma by exact arithmetic: the nearest whole number, the even one of two, then the clip."""
    end = 2 ** (k - 1) - 1
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return end if x > 0 else -end
    return max(-end, min(end, round(Fraction(x) / Fraction(2, 2**k))))


def oracle_q(x: Array, k: int) -> Array:
    """Q(x, k) = clip(sigma round(x / sigma), -1 + sigma, 1 - sigma), sigma = 2^(1 - k)."""
    return np.array([oracle_integer(v, k) / 2 ** (k - 1) for v in x.ravel()]).reshape(x.shape)


def oracle_shift(x: Fraction) -> Fraction:
    """The power of two whose exponent is the nearest to log2(x): 2^e with 2^(2e - 1) < x^2 < 2^(2e + 1)."""
    power = Fraction(1)
    while x * x > 2 * power * power:
        power *= 2
    while 2 * x * x < power * power:
        power /= 2
    return power


def oracle_alpha(n: int, k: int) -> float:
    """max(Shift(L_min / L_0), 1), L_min = 1.5 sigma, L_0 = sqrt(6 / n), by the squares of both."""
    square, alpha = Fraction(3, 2**k) ** 2 / Fraction(6, n), 1
    while square > 2 * alpha * alpha:
        alpha *= 2
    return float(alpha)


def numbers(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, ties, levels, numbers next to them, the ends, far outside, infinities, and random ones."""
    halves = torch.arange(-(2**k) - 3, 2**k + 4, dtype=dtype) * 2.0**-k
    near = torch.cat([torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)])
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 50.0, -50.0, math.inf, -math.inf], dtype=dtype)
    return torch.cat([halves, near, special, torch.randn(200, dtype=dtype)])


def on_grid(x: Tensor, k: int) -> bool:
    """Whether all of x are whole multiples of 2^(1 - k) within +-(1 - 2^(1 - k))."""
    whole = x.double() * 2 ** (k - 1)
    return bool((whole == whole.round()).all()) and bool((whole.abs() <= 2 ** (k - 1) - 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights(bits, dtype):
    x = numbers(bits, dtype)
    x = torch.cat([x, x.new_zeros(-len(x) % 36)]).reshape(-1, 4, 3, 3).requires_grad_()
    quantizer = methods.registry["wage"](bits_w=bits).weight()
    q, g = quantizer(x), torch.randn_like(x)
    q.backward(g)
    expected = oracle_q(x.detach().double().numpy(), bits) / oracle_alpha(36, bits)
    np.testing.assert_array_equal(q.detach().double().numpy(), expected)
    assert torch.equal(x.grad, g)
    assert q.unique().numel() == 2**bits - 1
    assert torch.equal(quantizer.decode(*quantizer.encode(x.float())), quantizer(x.float()))
    assert quantizer(torch.full((1, 36), math.nan)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_activations(bits, dtype):
    x = numbers(bits, dtype).requires_grad_()
    quantizer = methods.registry["wage"](bits_a=bits).activation()
    q, g = quantizer(x), torch.randn_like(x)
    q.backward(g)
    exact = x.detach().double().numpy()
    np.testing.assert_array_equal(q.detach().double().numpy(), oracle_q(exact, bits))
    inside = np.abs(exact) <= 1 - 2.0 ** (1 - bits)
    np.testing.assert_array_equal(x.grad.double().numpy(), np.where(inside, g.double().numpy(), 0.0))
    assert q.unique().numel() == 2**bits - 1
    assert quantizer(torch.tensor([math.nan], dtype=dtype)).item() == 0


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("side", ["weight", "activation"])
def test_codes_count_from_the_lower_end_of_the_grid(side, bits):
    make = getattr(methods.registry["wage"](bits_w=bits, bits_a=bits), side)
    codes, grid = make().encode(torch.tensor([[-9.0, 0.0, 9.0]]))
    top = 2 ** (bits - 1) - 1
    assert codes.tolist() == [[0, top, 2 * top]]
    assert (grid.bits, grid.multiplier, grid.offset) == (bits, 1, -top)
    assert math.frexp(grid.scale.item())[0] == 0.5, "a power of two"


def test_two_bits_are_three_values():
    """A quarter is halfway between 0 and 1/2, and 0 is the even one."""
    w = torch.tensor([[-0.9, -0.5, -0.26, -0.25, 0.0, 0.25, 0.26, 0.74, 3.0]])
    assert methods.registry["wage"]().weight()(w).tolist() == [[-0.5, -0.5, -0.5, 0, 0, 0, 0.5, 0.5, 0.5]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_scale_of_a_layer(bits):
    for n in [*range(1, 300), 500, 1152, 2304, 4608, 8192, 25088]:
        assert layer_scale(n, bits) == oracle_alpha(n, bits), n
    weight = torch.ones(5, 128, 3, 3)
    assert methods.registry["wage"](bits_w=bits).weight().encode(weight)[1].scale.item() == (
        2.0 ** (1 - bits) / oracle_alpha(1152, bits)
    )


def test_dividing_the_weight_by_alpha_is_dividing_what_the_quantizer_reads():
    """To the bit, through pooling and ReLU; the paper has it in front of the activation quantizer."""
    method = methods.registry["wage"]()
    weight, activation = method.weight(), method.activation()
    x, w = activation(torch.rand(4, 32, 8, 8)), torch.rand(16, 32, 3, 3) * 1.5 - 0.75
    alpha = layer_scale(32 * 9, 2)
    assert alpha > 1

    def rest(y: Tensor) -> Tensor:
        return functional.max_pool2d(y, 2).relu()

    theirs = activation(rest(functional.conv2d(x, weight(w) * alpha)) / alpha)
    assert torch.equal(activation(rest(functional.conv2d(x, weight(w)))), theirs)
    assert theirs.unique().numel() > 20


def test_shift_is_the_nearest_power_of_two_by_the_logarithm():
    exponents = torch.arange(-126, 127, dtype=torch.float64)
    mantissas = torch.tensor([1.0, 1.25, 2**0.5 - 1e-7, 2**0.5 + 1e-7, 1.75, 1 + 2.0**-23], dtype=torch.float64)
    for x in (exponents.exp2()[:, None] * mantissas).float().flatten():
        expected = float(oracle_shift(Fraction(x.item())))
        assert shift(torch.stack([x / 2, -x, x * 0])).item() == expected
    assert shift(torch.zeros(3)).item() == 1
    assert not shift(torch.tensor([1.0, math.inf])).isfinite()
    assert not shift(torch.tensor([1.0, math.nan])).isfinite()


def back(e: Tensor, bits: int) -> Tensor:
    """What arrives behind the quantizer of errors when ``e`` comes in."""
    x = torch.randn_like(e).requires_grad_()
    y = quantize_error(x, bits)
    assert torch.equal(y, x)
    y.backward(e)
    return x.grad


@pytest.mark.parametrize("size", [1e-12, 0.7, 3.0, 2.0**60])
@pytest.mark.parametrize("bits", [*range(2, 9), 12, 16])
def test_errors(bits, size):
    e = torch.randn(6, 4, 5, 5) * size
    e[0, 0, 0, 0] = 0
    power = float(oracle_shift(Fraction(e.abs().max().item())))
    found = back(e, bits)
    np.testing.assert_array_equal(found.double().numpy(), oracle_q(e.double().numpy() / power, bits))
    assert on_grid(found, bits)
    assert found.unique().numel() <= 2**bits - 1
    assert torch.equal(back(e * 2.0**-9, bits), found)


def test_errors_of_zero_and_errors_that_are_not_finite():
    assert torch.equal(back(torch.zeros(3, 4), 8), torch.zeros(3, 4))
    for bad in (math.nan, math.inf, -math.inf):
        assert back(torch.tensor([0.5, bad]), 8).isnan().any()


def test_errors_in_bfloat16_keep_their_dtype_and_their_grid():
    e = torch.randn(50, 7).bfloat16()
    found = back(e, 8)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), back(e.float(), 8))


@pytest.mark.parametrize("rate", [8.0, 1.0, 0.125])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_updates_by_mean_and_variance(bits, rate):
    """From 0, each weight moves by a neighbour of eta g / Shift(max|g|), in steps of the grid."""
    n = 4000
    g = torch.cat([torch.randn(40) * 0.3, torch.tensor([0.0, 1.5, -1.5, 1e-9])]) * 1e-3
    exact = rate * g.double().numpy() / float(oracle_shift(Fraction(g.abs().max().item())))
    weight = torch.zeros(n, len(g))
    update(weight, g.repeat(n, 1), rate, bits)
    assert on_grid(weight, bits)
    limit = 2 ** (bits - 1) - 1
    steps = -weight.double().numpy() * 2 ** (bits - 1)
    near = np.abs(exact) < limit - 1
    assert near.sum() > 30
    steps, exact = steps[:, near], exact[near]
    fraction = exact - np.floor(exact)
    assert np.all((steps == np.floor(exact)) | (steps == np.ceil(exact)))
    variance = fraction * (1 - fraction)
    assert np.all(np.abs(steps.mean(axis=0) - exact) <= 5 * np.sqrt(variance / n) + 1e-6)
    assert np.all(np.abs(steps.var(axis=0) - variance) <= 5 * np.sqrt(variance / n) + 1e-3)


def test_updates_clip_and_move_nothing_without_a_finite_gradient():
    start = torch.tensor([127.0, -127.0, 64.0, 0.0]) / 128
    weight = start.clone()
    update(weight, torch.tensor([-1.0, 1.0, 1.0, 0.0]), 8.0, 8)
    assert (weight * 128).tolist() == [127, -127, 56, 0]
    for g in (torch.zeros(4), torch.tensor([1.0, math.nan, 0.0, -2.0]), torch.tensor([1.0, math.inf, 0.0, -2.0])):
        weight = start.clone()
        update(weight, g, 8.0, 8)
        assert torch.equal(weight, start)


@pytest.mark.parametrize(("bits_w", "bits_g"), [(2, 8), (2, 4), (8, 8), (4, 12)])
@pytest.mark.parametrize("shape", [(64, 16, 3, 3), (500, 6), (300, 20)])
def test_first_weights(shape, bits_w, bits_g):
    weight = nn.Parameter(torch.full(shape, math.nan))
    initialise(weight, bits_w=bits_w, bits_g=bits_g)
    assert on_grid(weight, bits_g)
    bound = max(math.sqrt(6 / math.prod(shape[1:])), 1.5 * 2.0 ** (1 - bits_w))
    step, end = 2.0 ** (1 - bits_g), 1 - 2.0 ** (1 - bits_g)
    u = np.clip(np.round(np.linspace(-bound, bound, 100001) / step) * step, -end, end)
    found = weight.detach().double().numpy()
    assert np.abs(found).max() <= bound + step / 2
    assert abs(found.mean()) < 5 * u.std() / math.sqrt(found.size)
    assert found.std() == pytest.approx(u.std(), rel=0.05)


def test_weights_from_elsewhere_are_put_on_the_grid():
    weight = numbers(8)
    expected = oracle_q(weight.double().numpy(), 8)
    to_grid(weight, 8)
    np.testing.assert_array_equal(weight.double().numpy(), expected)
    once = weight.clone()
    to_grid(weight, 8)
    assert torch.equal(weight, once)


def test_the_loss_is_half_the_sum_of_squares():
    y, labels = torch.randn(7, 5), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    total = 0.0
    for row, label in zip(y.double().numpy(), labels.tolist(), strict=True):
        total += sum((value - (index == label)) ** 2 for index, value in enumerate(row)) / 2
    assert methods.registry["wage"]().loss == "sum_of_squares"
    assert module.loss_of("sum_of_squares", y, labels).item() == pytest.approx(total / 7)


def test_the_schedule_is_that_of_the_code():
    method = methods.registry["wage"]()
    paper = method.recipes["paper"]
    rates = [paper.learning_rate * multiplier(paper, epoch) for epoch in (0, 199.9, 200, 249.9, 250, 299)]
    assert rates == [8, 8, 1, 1, 0.125, 0.125]
    assert (paper.optimizer, paper.momentum, paper.weight_decay) == ("sgd", 0, 0)


@pytest.mark.parametrize("name", list(models.registry))
def test_networks_have_no_batch_norm_and_no_bias_and_all_layers_quantized(name):
    network = models.create(name, num_classes=3, method="wage", image_size=32)
    layers = quantized_layers(network)
    assert [id(layer.weight) for layer in layers] == [id(parameter) for parameter in network.parameters()]
    assert all(layer.weight_quantizer.bits == 2 for layer in layers)
    assert [layer.activation_quantizer is None for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert all(on_grid(layer.weight, 8) for layer in layers)
    norms = [path for path, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == (["stem.norm"] if name in ("airbench", "poolnet") else [])  # their own, whatever the blocks


def test_errors_between_layers_have_the_bits_that_were_asked():
    """What each layer passes back, before its weight and its input take it, is on the grid of bits_e."""
    network = models.create("lenet", num_classes=3, method="wage", image_size=16, method_options={"bits_e": 4})
    seen: list[Tensor] = []
    for layer in quantized_layers(network):
        inner = layer.transform

        def spy(*arguments: Tensor, inner: Callable[..., Tensor] = inner) -> Tensor:
            result = inner(*arguments)
            result.register_hook(seen.append)
            return result

        layer.transform = spy
    network(torch.randn(8, 3, 16, 16)).square().sum().backward()
    assert len(seen) == 4
    assert all(on_grid(error, 4) and error.unique().numel() > 2 for error in seen)


class Tiny(nn.Module):
    """Two convolutions and a dense layer, without bias or norm, for images (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.last = nn.Linear(32 * 4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.first(x), 2).relu()
        x = functional.max_pool2d(self.second(x), 2).relu()
        return self.last(x.flatten(1))


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Noise that is brighter on the left (class 0) or on the right (class 1)."""
    labels = torch.randint(2, (count,))
    side = torch.linspace(-1, 1, 8) * (2 * labels[:, None] - 1)
    return 0.7 * torch.randn(count, 1, 8, 8) + side[:, None, None, :], labels


@pytest.mark.parametrize("options", [{}, {"bits_w": 4, "bits_a": 4, "bits_g": 6, "bits_e": 5}], ids=str)
def test_a_plain_loop_learns_with_weights_on_their_grid_after_each_step(options):
    network, method = Tiny(), methods.registry["wage"](**options)
    quantize_(network, method)
    for layer in quantized_layers(network):
        method.initialise(layer.weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.0 if options else 8.0)
    attach_rules(optimizer, network)
    images, labels = halves(256)
    first = [layer.weight.detach().clone() for layer in quantized_layers(network)]
    for step in range(40):
        if step == 25:
            optimizer.param_groups[0]["lr"] /= 8
        batch = torch.randint(256, (64,))
        loss = module.sum_of_squares(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(on_grid(layer.weight, method.bits_g) for layer in quantized_layers(network))
    assert all(not torch.equal(layer.weight, w) for layer, w in zip(quantized_layers(network), first, strict=True))
    network.eval()
    with torch.no_grad():
        images, labels = halves(200)
        assert (network(images).argmax(1) == labels).float().mean() > 0.9


@pytest.fixture
def halves_folder(tmp_path: Path) -> Path:
    """`halves` as an image folder of 16x16 pixels."""
    from PIL import Image

    for part, count in (("train", 120), ("test", 40)):
        images, labels = halves(count)
        large = functional.interpolate(images, scale_factor=2)[:, 0]
        for index, (image, label) in enumerate(zip(large, labels.tolist(), strict=True)):
            folder = tmp_path / "images" / part / ("left", "right")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 40 + 128).clamp(0, 255).byte().numpy()).save(folder / f"{index:03}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_learns_with_weights_on_their_grid_after_each_step(precision, halves_folder, tmp_path, monkeypatch):
    counts = {"steps": 0, "moved": 0}

    def watch(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        attach_rules(optimizer, model)
        before = [layer.weight.detach().clone() for layer in quantized_layers(model)]
        assert all(on_grid(weight, 8) for weight in before)

        def after(*_: object) -> None:
            rate = optimizer.param_groups[0]["lr"]
            counts["steps"] += 1
            for layer, old in zip(quantized_layers(model), before, strict=True):
                assert on_grid(layer.weight, 8)
                # The largest |g| / Shift lies within sqrt(2), and rounding adds less than a step.
                largest = (layer.weight - old).abs().max() * 128
                assert largest <= math.ceil(rate * 2**0.5)
                counts["moved"] += bool(largest > 0)
                old.copy_(layer.weight.detach())

        optimizer.register_step_post_hook(after)

    monkeypatch.setattr(module, "attach_rules", watch)
    run = train(
        TrainConfig(
            out=tmp_path / "run",
            method="wage",
            model="lenet",
            model_options={"width": 0.5},
            data=f"folder:{halves_folder}",
            overrides={"batch_size": 16, "epochs": 6, "augment": False},
            precision=precision,
            threads=1,
            progress=False,
        )
    )
    assert counts["steps"] == 6 * (120 // 16)
    assert counts["moved"] > 0.8 * 4 * counts["steps"]
    assert [row["learning_rate"] for row in run.metrics()] == [8, 8, 8, 8, 1, 0.125]
    assert run.metrics()[-1]["test_accuracy"] > 0.9
    assert all(on_grid(layer.weight, 8) for layer in quantized_layers(models.load_run(run.path)))


@pytest.mark.parametrize("option", ["bits_w", "bits_a", "bits_g", "bits_e"])
@pytest.mark.parametrize("bits", [1, 17, 32])
def test_other_widths_are_refused(option, bits):
    with pytest.raises(UsageError, match=f"{option} of wage is '{bits}'"):
        methods.registry["wage"](**{option: bits})

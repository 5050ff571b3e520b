"""Fixed point against NumPy oracles of its formats, and its remedies by real runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ctrl_c import train_until
from torch import nn

import lowbit
from lowbit import methods, models
from lowbit.convert import quantize_
from lowbit.errors import UsageError
from lowbit.exporter.verify import verify
from lowbit.layers import quantized_layers
from lowbit.methods.fixed_point import (
    FixedPoint,
    FixedPointActivation,
    FixedPointWeight,
    power_of_two_above,
    sqnr_factor,
    stochastic_round,
)
from lowbit.runs import Run
from lowbit.training import TrainConfig, train
from lowbit.training.callbacks import Recorder
from lowbit.training.checkpoints import Checkpoint
from lowbit.training.module import TrainingModule

Array = npt.NDArray[np.float64]
FORMATS = ("range", "sqnr")
BITS = range(2, 9)


def oracle(x: Array, k: int, n: int) -> Array:
    """The nearest of the integers that k bits of two's complement hold, in units of 2^-n; halves to even."""
    return np.clip(np.rint(x * 2.0**n), -(2 ** (k - 1)), 2 ** (k - 1) - 1) / 2.0**n


def range_fraction(largest: float, k: int) -> int:
    """The most fractional bits with which the lowest level reaches ``largest``."""
    return max(n for n in range(-60, 60) if 2 ** (k - 1) * 2.0**-n >= largest)


def sqnr_fraction(deviation: float, k: int) -> int:
    """The number of fractional bits with the least squared error for normal numbers, integrated by midpoints."""
    width = 1e-3
    z = np.arange(-10 + width / 2, 10, width)
    density = np.exp(-(z**2) / 2)
    near = range(-int(np.floor(np.log2(deviation))) - 4, -int(np.floor(np.log2(deviation))) + 12)
    return min(near, key=lambda n: float(np.sum((oracle(deviation * z, k, n) - deviation * z) ** 2 * density)))


def fraction(x: Array, k: int, form: str) -> int:
    if form == "range":
        return range_fraction(float(np.max(np.abs(x))), k)
    present = x[x != 0]
    return sqnr_fraction(float(np.sqrt(np.mean(present**2))), k)


def run(quantizer: nn.Module, x: torch.Tensor, g: torch.Tensor) -> tuple[Array, Array]:
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(g)
    return q.detach().double().numpy(), x.grad.double().numpy()


def fraction_bits(quantizer: FixedPoint, x: torch.Tensor) -> int:
    return -int(torch.log2(quantizer.step(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.03, 700.0])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", BITS)
def test_weights(bits, form, scale, dtype):
    """With zeros of both signs, halves between levels, and numbers that only the range of ``range`` holds."""
    w = scale * torch.randn(6, 5, 3, 3, dtype=dtype)
    quantizer = FixedPointWeight(bits, form)
    w.view(-1)[0] = 6.5 * scale
    step = float(quantizer.step(w))
    w.view(-1)[1:9] = step * torch.tensor([0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 2.0**-20, -1.0], dtype=dtype)
    g = torch.randn_like(w)
    q, gradient = run(quantizer, w, g)
    exact = w.double().numpy()
    np.testing.assert_array_equal(q, oracle(exact, bits, fraction(exact, bits, form)))
    np.testing.assert_array_equal(gradient, g.double().numpy())


@pytest.mark.parametrize("bits", BITS)
def test_the_range_ends_at_powers_of_two(bits):
    quantizer = FixedPointWeight(bits)
    for exponent in (-9, 0, 5):
        end = torch.tensor(2.0**exponent)
        inside = torch.stack([end, -end])
        assert fraction_bits(quantizer, inside) == bits - 1 - exponent
        assert quantizer(inside).tolist() == [end * (1 - 2.0 ** (1 - bits)), -end]
        beyond = torch.nextafter(end, torch.tensor(torch.inf))
        assert fraction_bits(quantizer, beyond) == bits - 2 - exponent


@pytest.mark.parametrize("bits", BITS)
def test_the_signal_to_noise_ratio_is_the_greatest(bits):
    """Measured on normal numbers with zeros among them, against all other powers of two."""
    z = torch.randn(100_000, dtype=torch.float64)
    z[::3] = 0
    for deviation in (0.4, 1.0, 1.3, 1.7):
        x = deviation * z
        chosen = fraction_bits(FixedPointWeight(bits, "sqnr"), x)
        noise = {n: np.mean((oracle(x.numpy(), bits, n) - x.numpy()) ** 2) for n in range(chosen - 3, chosen + 4)}
        # Near a tie of two neighbours the sample may prefer the other one.
        assert noise[chosen] <= 1.02 * min(noise.values())


def test_the_factor_is_where_a_step_and_its_double_err_alike():
    for bits in BITS:
        for ratio in (0.98, 1.02):
            deviation = ratio / sqnr_factor(bits)
            assert sqnr_fraction(deviation, bits) == (0 if ratio < 1 else -1)


def test_weights_of_all_zeros_and_of_all_sizes_stay_finite():
    for form in FORMATS:
        quantizer = FixedPointWeight(4, form)
        assert quantizer(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
        for size in (1e-40, 1e-30, 1e30):
            assert quantizer(torch.tensor([size, -size])).isfinite().all()


def test_power_of_two_above():
    x = torch.tensor([1.0, 1.5, 0.5, 0.50001, 3e-20, 2.0**-90, 7e20])
    expected = [2.0 ** np.ceil(np.log2(v)) for v in x.double().tolist()]
    assert power_of_two_above(x).tolist() == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_activations_have_the_format_of_the_moving_average(bits, form):
    quantizer = FixedPointActivation(bits, form)
    average = 0.0
    for batch in range(12):
        x = torch.relu(torch.randn(64, 5)) * 1.7**batch
        exact = x.double().numpy()
        statistic = np.max(exact) if form == "range" else np.sqrt(np.mean(exact[exact != 0] ** 2))
        average = statistic if batch == 0 else 0.9 * average + 0.1 * statistic
        assert quantizer.bypass(x) is x if batch % 3 == 2 else quantizer(x).shape == x.shape
        assert quantizer.seen.item() == pytest.approx(average, rel=1e-5)
        find = range_fraction if form == "range" else sqnr_fraction
        assert fraction_bits(quantizer, x) == find(average, bits)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bits", BITS)
def test_activations_in_eval(bits, form):
    """Infinities, the ends of the grid and beyond; nothing is learned from them."""
    quantizer = FixedPointActivation(bits, form)
    quantizer(3 * torch.randn(100, 7))
    quantizer.eval()
    state, n = quantizer.seen.clone(), fraction_bits(quantizer, torch.zeros(1))
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    ends = torch.tensor([low - 0.25, high + 0.25, low - 9, high + 9, -0.0, torch.inf, -torch.inf])
    levels_and_halves = torch.arange(2 * low, 2 * high + 1) / 2
    x = torch.cat([torch.cat([ends, levels_and_halves]) * 2.0**-n, 5 * torch.randn(300)])
    g = torch.randn_like(x)
    q, gradient = run(quantizer, x, g)
    exact = x.double().numpy()
    np.testing.assert_array_equal(q, oracle(exact, bits, n))
    inside = (exact >= low * 2.0**-n) & (exact <= high * 2.0**-n)
    np.testing.assert_array_equal(gradient, np.where(inside, g.double().numpy(), 0))
    assert torch.equal(quantizer.seen, state)
    assert len(np.unique(q)) == 2**bits
    codes, grid = quantizer.encode(x)
    assert torch.equal(quantizer.decode(codes, grid), quantizer(x))


def test_the_average_is_saved_with_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_(model, "fixed_point")
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fresh.pop("1.activation_quantizer.seen") == 0
    model(torch.randn(9, 4))
    assert model.state_dict()["1.activation_quantizer.seen"] > 0


def test_before_any_data_numbers_up_to_1_are_expected():
    assert FixedPointActivation(5).eval()(torch.tensor([-3.0, 0.25])).tolist() == [-1.0, 0.25]


@pytest.mark.parametrize("kind", [FixedPointWeight, FixedPointActivation])
def test_stochastic_rounding_is_fair(kind):
    quantizer = kind(4, "range", "stochastic")
    x = torch.tensor([8.0, -8.0, 0.0, 1.0, -3.0, 0.25, -0.25, 2.9, -2.9, 6.5])
    n = 4000
    q, gradient = run(quantizer, x.repeat(n, 1), torch.ones(n, len(x)))
    part = np.mod(x.double().numpy(), 1.0)
    mean, variance = x.double().numpy().copy(), part * (1 - part)
    mean[0] = 7.0
    assert np.all(np.abs(q.mean(axis=0) - mean) <= 5 * np.sqrt(variance / n))
    # The fourth moment of a choice between two neighbours is at most its variance.
    assert np.all(np.abs(q.var(axis=0) - variance) <= 5 * np.sqrt(variance / n) + 1e-12)
    assert np.all(np.abs(q - x.numpy()) <= 1)
    assert np.all(gradient[:, 1:] == 1)
    nearest = torch.tensor([7.0, -8.0, 0.0, 1.0, -3.0, 0.0, 0.0, 3.0, -3.0, 6.0])
    assert torch.equal(quantizer.decode(*quantizer.encode(x)), nearest)
    assert torch.equal(quantizer.eval()(x), nearest)


def test_integers_are_never_rounded_away():
    x = torch.arange(-128.0, 128.0).repeat(2000, 1)
    assert torch.equal(stochastic_round(x), x)


@pytest.mark.parametrize(
    "options",
    [
        {"bits_w": 1},
        {"bits_a": 9},
        {"format": "max"},
        {"rounding": "up"},
        {"remedy": "p4"},
        {"top_layers": 0},
    ],
    ids=str,
)
def test_other_options_are_refused(options):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} of fixed_point is"):
        methods.registry["fixed_point"](**options)


# Phases: remedy, share done -> which of the readers 1, 2 and 3 are quantized, and the lowest of layers 0 to 3 to learn.
PHASES = [
    ("p1", 0.0, "", 0),
    ("p1", 0.99, "", 0),
    ("p2", 0.49, "", 0),
    ("p2", 0.5, "123", 2),
    ("p2", 0.9, "123", 2),
    ("p3", 0.0, "", 0),
    ("p3", 0.5, "1", 1),
    ("p3", 0.66, "1", 1),
    ("p3", 4 / 6, "12", 2),
    ("p3", 5 / 6, "123", 3),
    ("p3", 0.99, "123", 3),
]


def dense(method: methods.Method) -> nn.Sequential:
    """Four quantized layers, the first of which reads the input, and norms between them."""
    model = nn.Sequential(
        *[nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)],
        *[nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)],
    ).double()
    quantize_(model, method)
    return model


@pytest.mark.parametrize(("remedy", "done", "quantized", "lowest"), PHASES)
def test_phases(remedy, done, quantized, lowest):
    """Whatever the phase before; weights below, and what only they pass a gradient on to, stand still."""
    method = methods.registry["fixed_point"](remedy=remedy, top_layers=2)
    model = dense(method)
    layers = quantized_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for before in (0.0, 0.95, 0.6):
        method.phases(layers, before)
        method.phases(layers, done)
        assert [layer.activation_quantizer.enabled for layer in layers[1:]] == [str(i) in quantized for i in (1, 2, 3)]
        assert all(layer.weight_quantizer.enabled for layer in layers)
        assert [layer.weight.requires_grad for layer in layers] == [i >= lowest for i in range(4)]
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(8, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        first_moving = ("0.", "2.", "4.", "6.")[lowest]
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state[name]) == (name < first_moving), name
    method.phases(layers, 0.0)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("done", [0.0, 0.5, 4 / 6, 5 / 6])
def test_p3_passes_no_gradient_through_a_staircase_of_activations(done):
    """What the lowest layer that learns adds to its sums, its bias, has the gradient of a finite difference."""
    method = methods.registry["fixed_point"](bits_w=4, bits_a=3, remedy="p3")
    model = dense(method)
    method.phases(quantized_layers(model), done)
    x = torch.randn(8, 6, dtype=torch.float64)
    lowest = next(layer for layer in quantized_layers(model) if layer.weight.requires_grad)

    def loss() -> torch.Tensor:
        return model(x).square().sum()

    for _ in range(3):
        loss().backward()
    lowest.bias.grad = None
    loss().backward()
    slopes = []
    for index in range(len(lowest.bias)):
        ends = []
        for move in (1e-6, -2e-6):
            with torch.no_grad():
                lowest.bias[index] += move
                ends.append(loss())
        with torch.no_grad():
            lowest.bias[index] += 1e-6
        slopes.append(float(ends[0] - ends[1]) / 2e-6)
    torch.testing.assert_close(lowest.bias.grad, torch.tensor(slopes).double(), rtol=1e-4, atol=1e-5)


# Of the layers 0 to 3, the lowest that learns in the epochs 2 to 6.
LOWEST = {"p1": (0, 0, 0, 0, 0), "p2": (0, 0, 3, 3, 3), "p3": (0, 0, 1, 2, 3)}


def config(path: Path, remedy: str) -> TrainConfig:
    rounding = "stochastic" if remedy == "p3" else "nearest"
    return TrainConfig(
        out=path,
        method="fixed_point",
        method_options={"bits_w": 4, "bits_a": 4, "format": "sqnr", "rounding": rounding, "remedy": remedy},
        model="lenet",
        model_options={"width": 0.1},
        data="digits",
        overrides={"epochs": 6, "augment": False, "warmup": 0.0, "learning_rate": 0.01},
        precision="float32",
        threads=1,
        progress=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, list[dict[str, torch.Tensor]]]]:
    """A run with a remedy, made once, and its parameters at the end of each epoch."""

    @cache
    def finished(remedy: str) -> tuple[Run, list[dict[str, torch.Tensor]]]:
        ends: list[dict[str, torch.Tensor]] = []
        row = Recorder.row

        def watched(self: Recorder, module: TrainingModule) -> dict[str, float]:
            ends.append({name: parameter.detach().clone() for name, parameter in module.model.named_parameters()})
            return row(self, module)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recorder, "row", watched)
            return train(config(tmp_path_factory.mktemp("whole") / remedy, remedy)), ends

    return finished


@pytest.mark.parametrize("remedy", LOWEST)
def test_a_run_goes_through_its_phases(remedy, whole):
    """No parameter is lost from the optimizer on the way."""
    run, ends = whole(remedy)
    for before, after, lowest in zip(ends, ends[1:], LOWEST[remedy], strict=False):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved == {name for name in after if int(name.split(".")[0]) >= lowest}
    assert run.metrics()[-1]["test_accuracy"] > 0.6
    optimizer = Checkpoint.load(run.checkpoints_path / "last.ckpt").optimizer
    held = [index for group in optimizer["param_groups"] for index in group["params"]]
    assert len(optimizer["state"]) == len(held) == len(ends[-1])


@pytest.mark.parametrize("remedy", ["p2", "p3"])
def test_a_run_stopped_inside_a_phase_goes_on_to_the_same_weights(remedy, whole, tmp_path, monkeypatch):
    stopped = config(tmp_path / "stopped", remedy)
    train_until(stopped, monkeypatch, epoch=4, batch=2)
    runs = whole(remedy)[0], train(replace(stopped, resume=True))
    expected, found = (Checkpoint.load(run.checkpoints_path / "last.ckpt").model for run in runs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("bits_w", "bits_a", "form"), [(2, 3, "range"), (4, 4, "sqnr"), (8, 8, "range")], ids=str)
def test_export_gives_the_same_codes(bits_w, bits_a, form):
    """Layer 0 reads the image in float; sums of the others become codes, whatever the sign of a norm's factor."""
    method = methods.registry["fixed_point"](bits_w=bits_w, bits_a=bits_a, format=form)
    model = models.create("lenet", num_classes=4, method=method, in_channels=3, image_size=16, width=0.2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    images = torch.randn(12, 3, 16, 16)
    with torch.no_grad():
        model(images)
    model.eval()
    packed = lowbit.export(model, images).packed
    kinds = [op["op"] for op in packed.ops]
    assert kinds.count("quant_conv2d") == 3
    assert kinds.count("conv2d") == 1
    report = verify(model, packed, images)
    assert report.passed, report
    exact = [check.different for check in report.layers if check.exact]
    assert exact
    assert not any(exact)

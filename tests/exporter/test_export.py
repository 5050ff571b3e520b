"""Exported graphs, run by the NumPy interpreter and the engine, against the torch models that they came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import checked, ops
from nets import Plain, Residual, Shared, awkward_, chain, quantized
from pairs import pairs
from torch import Tensor, nn
from torch.nn.utils import prune

import lowbit
from lowbit import methods, models
from lowbit.errors import UsageError
from lowbit.exporter.verify import verify
from lowbit.preprocessing import Preprocessing

IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))

SMALL = {
    "lenet": {"width": 0.2},
    "nin": {"width": 0.1},
    **{f"vgg{n}": {"width": 0.05} for n in (11, 13, 16, 19)},
    "vgg_small": {"width": 0.07},
    "patchnet": {"width": 0.05, "image_size": 10},
    "poolnet": {"width": 0.1, "image_size": 10},
    "airbench": {"width": 0.1, "image_size": 10},
    "resnet18": {"width": 0.05, "image_size": 8},
    "resnet20": {"width": 0.2, "image_size": 9, "shortcut": "conv"},
    "resnet34": {"width": 0.03, "image_size": 8},
}


@pytest.mark.filterwarnings("ignore:an activation quantizer has seen no data")
@pytest.mark.parametrize(("name", "method"), pairs({name: methods.registry[name]() for name in methods.registry}))
def test_models_and_methods(name: str, method: str) -> None:
    options = {"image_size": 32, **SMALL.get(name, {})}
    model = awkward_(models.create(name, method=method, **options))
    exported, report = checked(model, torch.randn(3, 3, options["image_size"], options["image_size"]))
    quantized_layers = {n for n, m in model.named_modules() if getattr(m, "activation_quantizer", None) is not None}
    assert {check.layer for check in report.layers} == quantized_layers
    assert [part.name for part in exported.parts if part.kind.startswith("QuantConv") and not part.packed] == []


CHAINS = {
    "nothing between": [],
    "batch norm": [nn.BatchNorm2d(7)],
    "batch norm, relu, batch norm": [nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.BatchNorm2d(7)],
    "pool in front": [nn.MaxPool2d(2), nn.BatchNorm2d(7)],
    "pool behind": [nn.BatchNorm2d(7), nn.MaxPool2d(3, 2, 1)],
    "pool in the middle": [nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.BatchNorm2d(7)],
    "two pools": [nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.BatchNorm2d(7), nn.MaxPool2d((2, 1)), nn.BatchNorm2d(7)],
    "pool, relu in place": [nn.BatchNorm2d(7), nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.BatchNorm2d(7)],
    "hardtanh": [nn.BatchNorm2d(7), nn.Hardtanh(-0.3, 0.7, inplace=True), nn.BatchNorm2d(7)],
    "leaky relu": [nn.BatchNorm2d(7), nn.LeakyReLU(0.1), nn.BatchNorm2d(7)],
    "prelu": [nn.PReLU(7), nn.BatchNorm2d(7)],
    "relu6, dropout": [nn.ReLU6(), nn.Dropout(), nn.Identity(), nn.BatchNorm2d(7)],
    "batch norm without weights": [nn.BatchNorm2d(7, affine=False)],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", CHAINS.values(), ids=CHAINS)
def test_chains_between_two_binary_layers_become_thresholds(between: list[nn.Module], bias: bool) -> None:
    exported, report = checked(chain(*between, bias=bias), IMAGES)
    pools = sum(isinstance(module, nn.MaxPool2d) for module in between)
    assert ops(exported)[:4] == ["conv2d", "threshold", "binary_conv2d", "max_pool" if pools else "binary_conv2d"]
    assert ops(exported).count("max_pool") == pools
    assert [check.exact for check in report.layers] == [False, True, True]


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2, padding=1), nn.AvgPool2d(3, 2, 1, count_include_pad=False)])
def test_an_average_pool_is_a_float_op_and_breaks_the_chain(pool: nn.Module) -> None:
    exported, report = checked(chain(pool, nn.BatchNorm2d(7)), IMAGES)
    assert ops(exported)[2:6] == ["binary_conv2d", "avg_pool", "threshold", "binary_conv2d"]
    assert [(check.what, check.exact) for check in report.layers][1:3] == [("sums out", True), ("codes in", False)]


@pytest.mark.parametrize("activation", [nn.LeakyReLU(-0.5), nn.PReLU(7, -0.5)])
def test_an_activation_that_falls_and_rises_is_a_float_op_and_breaks_the_chain(activation: nn.Module) -> None:
    exported, _ = checked(chain(activation, nn.BatchNorm2d(7)), IMAGES)
    assert ops(exported)[2:5] == ["binary_conv2d", "prelu", "threshold"]


GEOMETRIES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 3},
    {"kernel_size": 5, "padding": "valid"},
    {"kernel_size": 3, "groups": 3, "padding": 3},
    {"kernel_size": 1, "groups": 9},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [9, 72])
def test_strides_padding_dilation_and_groups(geometry: dict, channels: int) -> None:
    layer = nn.Conv2d(channels, channels, **geometry)
    checked(
        quantized(nn.Sequential(nn.Conv2d(3, channels, 3), layer, nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1))),
        IMAGES,
    )


def test_a_users_own_module() -> None:
    exported, report = checked(quantized(Plain()), IMAGES)
    assert ops(exported).count("add") == 2
    hidden = next(op for op in exported.packed.ops if op["source"] == "hidden" and "kernel" in op)
    assert (hidden["op"], hidden["kernel"], hidden["channels"]) == ("binary_conv2d", [4, 4], 13)
    assert [check.layer for check in report.layers if check.what == "codes in"][-1] == "hidden"


def test_a_network_of_shortcuts() -> None:
    body = [Residual(6, 6, 1), Residual(6, 10, 2), Residual(10, 10, 1)]
    checked(
        quantized(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *body, nn.AdaptiveAvgPool2d(2), nn.Conv2d(10, 4, 2))),
        IMAGES,
    )


@pytest.mark.parametrize("shortcut", ["block", "conv"])
def test_a_residual_net_after_folding_and_calibration(shortcut: str) -> None:
    """Sums are made in float, and named after the units; all that convolutions read is codes."""
    options = {"width": 1 / 4, "image_size": 9, "shortcut": shortcut}
    trained = awkward_(models.create("resnet20", **options))
    images = torch.randn(6, 3, 9, 9)
    expected = trained(images)
    lowbit.fold_batch_norms_(trained)
    model = models.create("resnet20", method="affine", method_options={"fold": True}, **options).eval()
    missing, unexpected = model.load_state_dict(trained.state_dict(), strict=False)
    assert all("observer" in name for name in missing)
    assert not unexpected
    lowbit.calibrate(model, [images])
    exported, _ = checked(model, images)
    found = lowbit.Engine(exported.packed)(images.numpy())
    assert np.abs(found - expected.detach().numpy()).max() < 0.1 * expected.abs().max()
    assert not {"conv2d", "affine"} & set(ops(exported))
    sums = [op["source"] for op in exported.packed.ops if op["op"] == "add"]
    units = 3 if shortcut == "block" else 6
    assert sums == [f"stage{stage}.{unit}" for stage in (1, 2, 3) for unit in range(units)]


def test_codes_behind_a_pool_that_a_shortcut_reads_too() -> None:
    """They come of what the pool gives, which is made in float anyway; what no shortcut reads stays a pool of codes."""
    options = {"width": 1 / 16, "image_size": 33, "stem": "imagenet"}
    exported, _ = checked(awkward_(models.create("resnet18", method="bnn", **options)), torch.randn(2, 3, 33, 33))
    assert ops(exported)[:6] == ["conv2d", "max_pool", "affine", "threshold", "binary_conv2d", "binary_conv2d"]


@pytest.mark.parametrize("alike", [True, False])
def test_one_result_read_by_two_quantized_layers(alike: bool) -> None:
    exported, _ = checked(quantized(Shared(alike)), IMAGES)
    names = ops(exported)
    assert names.count("threshold") == (1 if alike else 3)
    base = next(i for i, op in enumerate(exported.packed.ops) if op["source"] == "base" and "kernel" in op)
    assert (f"{base}.thresholds" in exported.packed.tensors) == alike


def test_a_dense_network_on_feature_vectors() -> None:
    layers = [
        nn.Linear(20, 33),
        nn.BatchNorm1d(33),
        nn.Linear(33, 70),
        nn.BatchNorm1d(70),
        nn.Linear(70, 3),
        nn.BatchNorm1d(3),
    ]
    exported, _ = checked(quantized(nn.Sequential(*layers), "bnn"), torch.randn(9, 20))
    assert exported.packed.input_shape == (20, 1, 1)
    assert ops(exported) == ["conv2d", "threshold", "binary_conv2d", "binary_conv2d", "affine"]


def test_sums_beyond_the_exhaustive_limit() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 70, 1), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(70 * 32 * 32, 5), nn.BatchNorm1d(5)
    )
    model.extend([nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)])
    exported, _ = checked(quantized(model), torch.randn(3, 3, 32, 32))
    assert ops(exported) == ["conv2d", "threshold", "binary_conv2d", "binary_conv2d", "affine", "conv2d"]


def test_exporting_changes_nothing_and_repeats_to_the_byte() -> None:
    model = chain(nn.BatchNorm2d(7)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (lowbit.export(model, IMAGES).packed.to_bytes() for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_file_holds_what_prediction_needs(tmp_path) -> None:
    preprocessing = Preprocessing("RGB", (16, 16), 0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    exported = lowbit.export(
        chain(), IMAGES, classes=list("abcd"), preprocessing=preprocessing, provenance={"run": "x"}
    )
    exported.save(tmp_path / "m.lowbit")
    engine = lowbit.Engine(tmp_path / "m.lowbit")
    assert engine.classes == list("abcd")
    assert engine.preprocessing == preprocessing
    assert engine.model.provenance["run"] == "x"


def test_the_report_says_what_became_of_each_part() -> None:
    parts = {part.name: part for part in lowbit.export(chain(nn.BatchNorm2d(7), nn.MaxPool2d(2)), IMAGES).parts}
    assert not parts["0"].packed
    assert parts["0"].note == "float32: not quantized"
    assert parts["2"].note == "1-bit weights and activations; sums become codes"
    assert parts["3"].note == "inside the thresholds of '5'"
    assert parts["4"].note == "on codes"
    assert parts["5"].note == "1-bit weights and activations; sums become float32, read by '7'"


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Cat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


class _Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) + x


class _AddInPlace(nn.Module):
    """`o` is `x` itself, so that the last sum reads what `+=` has made of it."""

    def forward(self, x: Tensor) -> Tensor:
        o = x
        o += torch.relu(x)
        return o + x


class _InPlaceBehind(nn.Module):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.between(x)) + self.between(x)


class _AddWithFactor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, 2, torch.relu(x))  # an overload that torch calls deprecated, and runs


class _AddWithAlpha(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, torch.relu(x), alpha=0.5)


class _MeanByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(input=x, dim=(2, 3))


def hooked(module: nn.Module, position: int) -> nn.Module:
    model = chain(module)
    model[position].register_forward_hook(lambda module, given, result: 2 * result)
    return model


def pruned() -> nn.Module:
    model = chain(nn.ReLU())
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


class _AddVector(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True)


def test_a_prelu_that_falls_and_rises_is_computed_in_float() -> None:
    """Thresholds cannot express it; a slope for all channels and a leaky ReLU have the same op."""
    model = chain(nn.PReLU(init=-1.0), nn.BatchNorm2d(7))
    model.append(nn.Unflatten(1, (4, 1, 1))).append(nn.LeakyReLU(0.3)).append(nn.Flatten())
    exported, report = checked(model, IMAGES)
    assert ops(exported)[2:5] == ["binary_conv2d", "prelu", "threshold"]
    assert ops(exported)[-1] == "prelu"
    assert [check.exact for check in report.layers if check.layer == "5"] == [True, True]


def test_a_change_in_place_shows_whatever_the_example_input_holds() -> None:
    """Without a bias a convolution of zeros gives zeros, to which adding in place adds nothing."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), _AddInPlace())
    with pytest.raises(UsageError, match="a tensor is changed in place"):
        lowbit.export(model, torch.zeros(1, 3, 8, 8))


def falling_and_rising() -> nn.Module:
    """A quantizer of codes of |x| > 1."""
    model = chain()
    quantizer = model[3].activation_quantizer
    encode = quantizer.encode
    quantizer.encode = lambda x: encode(x.abs() - 1)
    return model


class _Pooled(nn.Module):
    """What many residual networks do behind their last map; and options that have defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, features: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = F.relu(self.conv(x))
        if mask is not None:
            h = h + mask
        h = F.avg_pool2d(h, h.size()[3]).view(h.size(0), -1)
        return h if features else self.fc(h)


def test_sizes_that_forward_asks_for_and_options_with_defaults() -> None:
    exported, _ = checked(awkward_(_Pooled()), IMAGES)
    assert ops(exported) == ["conv2d", "relu", "avg_pool", "conv2d"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_exported_without_the_wrap(wrap) -> None:
    model = chain()
    wrapped = wrap(model)
    expected = lowbit.export(model, IMAGES[:1]).packed
    assert lowbit.export(wrapped, IMAGES[:1]).packed.to_bytes() == expected.to_bytes()
    assert verify(wrapped, expected, IMAGES).passed


class _Calling(nn.Module):
    """Two convolutions and a function of the module and its input."""

    def __init__(self, forward: Callable[[_Calling, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.call = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x)


class _Keeping(_Calling):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.f(x)
        return F.relu(self.kept)


class _TwoInputs(_Calling):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.f(x + y)


class _OfPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Conv2d(3, 2, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["class"](x)


def keeping() -> nn.Module:
    model = _Keeping(_Calling.forward)
    model(torch.zeros(1, 3, 16, 16))
    return model


def with_a_hook(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    return model


REFUSED = {
    "a kept result": (keeping(), "'kept' keeps a result of forward with its gradient"),
    "two inputs": (_TwoInputs(_Calling.forward), "the model takes a second input 'y'; it must take one tensor"),
    "a random forward": (
        _Calling(lambda self, x: F.dropout(self.f(x))),
        "something is random, such as a dropout that is called without training=self.training",
    ),
    "a hook of the model": (with_a_hook(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())), "the model has a hook"),
    "a tensor by name": (
        _Calling(lambda self, x: torch.relu(input=self.f(x))),
        "the call of 'relu' (node 'relu') cannot be lowered; give it one tensor, in the first place and not by name",
    ),
    "a slice": (_Calling(lambda self, x: self.f[1:](self.f[:1](x))), "call the layers of a slice one by one"),
    "a name of Python": (
        _OfPython(),
        "the layer 'heads.class' has a name that Python code cannot hold; rename it",
    ),
    "control flow": (chain(_Branch()), "'3' (_Branch) cannot be captured"),
    "concatenation": (
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.Identity(), nn.ReLU(), _Cat()),
        "call of 'cat' (node 'cat', in '3') cannot be lowered",
    ),
    "unknown module": (chain(nn.GELU()), "'3' (GELU) cannot be lowered"),
    "in place on a shared tensor": (chain(_Aliased()), "'3.act' works in place on a tensor that is read elsewhere too"),
    "added in place to what is read elsewhere": (
        nn.Sequential(nn.Conv2d(3, 2, 1), _AddInPlace()),
        "a tensor is changed in place, as by `+=`",
    ),
    "in place behind a dropout": (chain(_InPlaceBehind(nn.Dropout())), "'3.act' works in place on a tensor"),
    "in place behind a view": (chain(_InPlaceBehind(nn.Flatten(3))), "'3.act' works in place on a tensor"),
    "an addition with a factor": (chain(_AddWithFactor()), "the addition 'add', in '3' must be of two tensors"),
    "an addition with alpha": (chain(_AddWithAlpha()), "the addition 'add', in '3' must be of two tensors"),
    "a mean by names alone": (
        nn.Sequential(nn.Conv2d(3, 2, 1), _MeanByName()),
        "call of 'mean' (node 'mean', in '1') cannot be lowered",
    ),
    "a hook": (hooked(nn.ReLU(), 0), "'0' has a hook, which the packed network would not have"),
    "a hook on dropout": (hooked(nn.Dropout(), 3), "'3' has a hook, which the packed network would not have"),
    "a pruned layer": (pruned(), "prune.remove"),
    "a flattened map": (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), "the model returns a flattened map"),
    "broadcast addition": (chain(_AddVector()), "the addition 'add', in '3' must be of two tensors of one shape"),
    "padding mode": (
        nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")),
        "'0' (Conv2d) has padding_mode 'reflect'",
    ),
    "ceil mode": (chain(nn.MaxPool2d(2, ceil_mode=True)), "'3' (MaxPool2d) has ceil_mode=True"),
    "pool dilation": (chain(nn.MaxPool2d(2, dilation=2)), "'3' (MaxPool2d) has dilation"),
    "batch statistics": (
        chain(nn.BatchNorm2d(7, track_running_stats=False)),
        "'3' (BatchNorm2d) has no running statistics",
    ),
    "batch norm of a flattened map": (
        quantized(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.BatchNorm1d(392), nn.Linear(392, 3))),
        "'2' (BatchNorm1d) normalises a flattened map of 2 x 14 x 14",
    ),
    "linear on a map": (
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.Linear(16, 3)),
        "'1' (Linear) reads a map; flatten it first",
    ),
    "same padding of an even kernel": (
        nn.Sequential(nn.Conv2d(3, 2, 4, padding="same")),
        "'0' has padding 'same' with an even kernel",
    ),
    "unequal windows": (
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(5)),
        "'1' averages a 16x16 map to 5x5 in unequal",
    ),
    "chain that rises and falls": (
        falling_and_rising(),
        "what '3' reads of '2': the code of channel 0 both rises and falls",
    ),
    "two outputs": (
        nn.Sequential(nn.Conv2d(3, 2, 1), nn.MaxPool2d(2, return_indices=True)),
        "the model returns more than one tensor",
    ),
    "double precision": (nn.Sequential(nn.Conv2d(3, 2, 1)).double(), "parameter '0.weight' is not float32"),
    "wrong channels": (
        nn.Sequential(nn.Conv2d(4, 2, 1)),
        "'0' does not run on what the example input becomes: Given groups=1",
    ),
}


@pytest.mark.parametrize(("model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_lowered_is_refused_by_name(model: nn.Module, message: str) -> None:
    with pytest.raises(UsageError) as error:
        lowbit.export(model.eval(), IMAGES)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "dtype_or_shape",
    [
        torch.zeros(1, 3, 16),
        torch.zeros(1, 3, 16, 16).double(),
        torch.zeros(0, 3, 16, 16),
        np.zeros((1, 3, 16, 16), np.float32),
    ],
)
def test_the_example_input_must_be_a_float32_batch(dtype_or_shape: Tensor) -> None:
    with pytest.raises(UsageError, match="the example input is"):
        lowbit.export(chain(), dtype_or_shape)


def test_descriptions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="3 class names are given, but the model has 4 outputs"):
        lowbit.export(chain(), IMAGES, classes=list("abc"))
    with pytest.raises(UsageError, match=r"preprocessing makes inputs \(1, 28, 28\)"):
        lowbit.export(chain(), IMAGES, preprocessing=Preprocessing("L", (28, 28), 0, (0.5,), (0.5,)))


def test_engine_and_torch_agree_on_channels_last_input() -> None:
    model = chain(nn.BatchNorm2d(7))
    logits = model(IMAGES.to(memory_format=torch.channels_last)).detach().numpy()
    found = lowbit.Engine(lowbit.export(model, IMAGES).packed)(IMAGES.numpy())
    assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max()

"""quantize_: which layer gets which method."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lowbit
from lowbit import methods
from lowbit.convert import LayerReport, quantize_, resolve_method
from lowbit.errors import UsageError
from lowbit.layers import QuantConv2d, QuantizedLayer, QuantLinear, Stem, quantized_twin
from lowbit.methods import Method
from lowbit.methods.xnor_net import ScaledSign
from lowbit.quantizers.binary import SignQuantizer

ACTIVATIONS_ONLY = Method("a", "A", "none", "", 32, 1, "conv_bn_act", activation=SignQuantizer, skip_first=False)
WEIGHTS_ONLY = Method("w", "W", "none", "", 1, 32, "conv_bn_act", weight=ScaledSign, skip_last=False)


def network() -> nn.Module:
    """Five layers among others."""
    features = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2)
    )
    return nn.ModuleDict({"features": features, "neck": nn.Sequential(nn.Conv1d(4, 4, 1)), "head": nn.Linear(4, 2)})


LAYERS = ("features.0", "features.2", "features.4", "neck.0", "head")

# method, overrides: (bits of W, bits of A) of each layer
CASES = {
    "xnor_net": ("xnor_net", {}, ["32/32", "1/1", "1/1", "1/1", "32/32"]),
    "bnn: the first layer reads the image": ("bnn", {}, ["1/32", "1/1", "1/1", "1/1", "1/1"]),
    "float": ("float", {}, ["32/32"] * 5),
    "a method made with options": (methods.registry["xnor_net"](relu=True), {}, ["32/32", *["1/1"] * 3, "32/32"]),
    "weights only": (WEIGHTS_ONLY, {}, ["32/32", *["1/32"] * 4]),
    "activations only": (ACTIVATIONS_ONLY, {}, ["32/32", *["32/1"] * 3, "32/32"]),
    "one name to float": ("bnn", {"neck.0": None}, ["1/32", "1/1", "1/1", "32/32", "1/1"]),
    "a name does not match its children": ("bnn", {"head": "float"}, ["1/32", "1/1", "1/1", "1/1", "32/32"]),
    "a pattern": ("bnn", {"features.*": None}, ["32/32", "32/32", "32/32", "1/1", "1/1"]),
    "another method": ("xnor_net", {"neck.*": "bnn", "head": WEIGHTS_ONLY}, ["32/32", *["1/1"] * 3, "1/32"]),
    "first and last by pattern": ("xnor_net", {"*": "bnn"}, ["1/32", "1/1", "1/1", "1/1", "1/1"]),
    "first by its name": ("xnor_net", {"features.0": "bnn"}, ["1/1", "1/1", "1/1", "1/1", "32/32"]),
    "the last match wins": ("bnn", {"*": None, "features.[24]": "bnn"}, ["32/32", "1/1", "1/1", "32/32", "32/32"]),
    "order matters": ("bnn", {"features.[24]": "bnn", "*": None}, ["32/32"] * 5),
    "a set of characters": ("bnn", {"features.[24]": None}, ["1/32", "32/32", "32/32", "1/1", "1/1"]),
}


@pytest.mark.parametrize(("method", "overrides", "bits"), CASES.values(), ids=CASES)
def test_which_layer_gets_what(method, overrides, bits):
    model = network()
    reports = quantize_(model, method, overrides)
    assert [report.name for report in reports] == list(LAYERS)
    assert [report.kind for report in reports] == ["Conv2d", "Conv2d", "Conv2d", "Conv1d", "Linear"]
    assert [f"{report.bits_w}/{report.bits_a}" for report in reports] == bits
    for report in reports:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, QuantizedLayer) == ((report.bits_w, report.bits_a) != (32, 32))
        if isinstance(layer, QuantizedLayer):
            assert (layer.weight_quantizer is None) == (report.bits_w == 32)
            assert (layer.activation_quantizer is None) == (report.bits_a == 32)


def test_reports_say_why():
    reports = quantize_(network(), "xnor_net", {"neck.*": None, "features.4": "bnn"})
    assert reports == [
        LayerReport("features.0", "Conv2d", 32, 32, "first layer"),
        LayerReport("features.2", "Conv2d", 1, 1, ""),
        LayerReport("features.4", "Conv2d", 1, 1, "by override 'features.4'"),
        LayerReport("neck.0", "Conv1d", 32, 32, "by override 'neck.*'"),
        LayerReport("head", "Linear", 32, 32, "last layer"),
    ]


@pytest.mark.parametrize(
    ("method", "bits"), [("xnor_net", ["32/32"] * 2), ("bnn", ["1/32", "1/1"]), ("bwn", ["32/32"] * 2)]
)
def test_the_first_layer_is_a_whole_stem_where_there_is_one(method, bits):
    model = nn.Sequential(
        Stem(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 2, 1)
    )
    reports = quantize_(model, method)
    assert [report.name for report in reports] == ["0.0", "0.2", "1", "2"]
    assert [f"{report.bits_w}/{report.bits_a}" for report in reports[:2]] == bits
    assert [report.note for report in reports[:2]] == (["first layer"] * 2 if bits[0] == "32/32" else [""] * 2)
    assert isinstance(model[1], QuantizedLayer)


def test_an_override_reaches_into_a_stem():
    model = nn.Sequential(Stem(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 2, 1))
    reports = quantize_(model, "xnor_net", {"0.1": "bnn"})
    assert [f"{report.bits_w}/{report.bits_a}" for report in reports] == ["32/32", "1/1", "1/1", "32/32"]


def test_what_a_method_left_of_a_stem_takes_8_bits_afterwards():
    model = nn.Sequential(
        Stem(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)), nn.Conv2d(5, 4, 3), nn.Conv2d(4, 2, 1)
    )
    quantize_(model, "xnor_net")
    reports = quantize_(model, "affine")
    assert [(report.name, report.bits_w, report.bits_a) for report in reports] == [
        ("0.0", 8, 8),
        ("0.2", 8, 8),
        ("2", 8, 8),
    ]


def test_the_methods_quantizers_and_projections_are_used():
    model = network()
    quantize_(model, "xnor_net", {"neck.0": "bnn", "head": WEIGHTS_ONLY})
    assert isinstance(model["features"][2].weight_quantizer, ScaledSign)
    assert isinstance(model["neck"][0].weight_quantizer, SignQuantizer)
    assert model["neck"][0].projection is methods.registry["bnn"]().projection
    assert model["head"].projection is None
    assert model["features"][2].weight_quantizer is not model["features"][4].weight_quantizer


def test_parameters_stay_and_are_projected_once():
    model = network()
    with torch.no_grad():
        model["features"][2].weight.mul_(20)
    parameters = dict(model.named_parameters())
    untouched = {name: copy.deepcopy(model.get_submodule(name).weight) for name in ("features.0", "head")}
    latent = model["features"][2].weight.detach().clone()
    quantize_(model, "xnor_net")
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameter for name, parameter in parameters.items())
    for name, weight in untouched.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    projected = (latent - latent.mean(dim=1, keepdim=True)).clamp(-1, 1)
    assert torch.allclose(model["features"][2].weight, projected)


class Twice(nn.Module):
    """One convolution under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4), self.first), nn.BatchNorm2d(4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        return self.head(self.blocks[0](self.blocks[1](x)))


@pytest.mark.parametrize("overrides", [{}, {"blocks.0.1": "xnor_net"}, {"first": "xnor_net"}], ids=str)
def test_a_layer_under_two_names_stays_one_layer(overrides):
    model = Twice()
    weight = model.first.weight
    reports = quantize_(model, "xnor_net", overrides)
    assert [report.name for report in reports] == ["stem", "first", "head"]
    assert isinstance(model.first, QuantConv2d)
    assert model.blocks[0][1] is model.first
    assert model.first.weight is weight
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append(None))
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert len(calls) == 2
    assert weight.grad is not None


def test_a_shared_layer_goes_to_float_by_either_name():
    model = Twice()
    assert [report.bits_w for report in quantize_(model, "bnn", {"blocks.*": None})] == [1, 32, 1]
    assert type(model.first) is nn.Conv2d
    assert model.blocks[0][1] is model.first


def test_a_block_used_twice_is_converted_once():
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(nn.Linear(4, 4), block, block, nn.Linear(4, 4))
    assert [report.name for report in quantize_(model, "bnn")] == ["0", "1.0", "3"]
    assert model[1] is model[2] is block
    assert isinstance(block[0], QuantLinear)


def test_a_second_method_takes_what_the_first_left_in_float():
    model = network()
    quantize_(model, "xnor_net")
    binary = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    with torch.no_grad():
        for layer in binary.values():
            layer.weight.add_(0.5)  # not centred any more: a second projection would show
    state = copy.deepcopy(model.state_dict())
    reports = quantize_(model, methods.registry["affine"](bits_a=4))
    # The first layer reads the image in 8 bits, whatever the others have.
    assert reports == [LayerReport("features.0", "Conv2d", 8, 8), LayerReport("head", "Linear", 8, 4)]
    assert all(model.get_submodule(name) is layer for name, layer in binary.items())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_what_a_second_method_takes_first_need_not_read_the_image():
    model = network()
    quantize_(model, "bnn", {"features.4": None})
    (report,) = quantize_(model, methods.registry["affine"](bits_a=4))
    assert (report.name, report.bits_a) == ("features.4", 4)


class OwnLinear(nn.Linear):
    """Not torch's own type."""


def test_subclasses_stay_and_are_reported():
    model = nn.Sequential(nn.Linear(2, 2), OwnLinear(2, 2), nn.Linear(2, 2))
    *others, last = quantize_(model, "bnn")
    assert [report.name for report in others] == ["0", "2"]
    assert last == LayerReport("1", "OwnLinear", 32, 32, "a subclass of torch's layer, left as it is")
    assert type(model[1]) is OwnLinear


def with_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its parametrization, whose layers are subclasses
        return nn.utils.weight_norm(layer)


def with_a_forward_of_its_own(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return layer


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_weight_norm, "a hook computes its weight"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "a hook computes its weight"),
        (with_a_forward_of_its_own, "its forward was replaced"),
    ],
    ids=["weight norm", "pruned", "own forward"],
)
def test_what_would_go_on_in_float_stays_and_is_reported(change, why):
    model = nn.Sequential(nn.Linear(4, 4), change(nn.Linear(4, 4)), nn.Linear(4, 4))
    *others, last = quantize_(model, "bnn")
    assert [report.name for report in others] == ["0", "2"]
    assert (last.name, last.bits_w) == ("1", 32)
    assert last.note.startswith(why)
    assert type(model[1]) is nn.Linear
    with pytest.raises(UsageError, match=why):
        quantized_twin(model[1], None, None)


def test_a_compiled_layer_computes_with_its_quantizers():
    layer = nn.Linear(4, 4)
    layer.compile(backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    before = model(x)
    quantize_(model, "dorefa")
    assert not torch.allclose(model(x), before)


def test_transformers_compute_with_codes_in_evaluation_too():
    """Torch has a fused kernel for `eval()` without gradients, which reads the weights past the layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"in": nn.Linear(8, 8), "encoder": nn.TransformerEncoder(layer, 1), "out": nn.Linear(8, 8)})
    reports = quantize_(model, "dorefa")
    low = {f"encoder.layers.0.linear{number}" for number in (1, 2)}
    assert {report.name for report in reports if report.bits_w == 1} == low
    x, padding = torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
    trained = model["encoder"](x, src_key_padding_mask=padding)
    model.eval()
    with torch.no_grad():
        found = model["encoder"](x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], trained[~padding], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_type_trains_and_evaluates(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = model.to(dtype)
    quantize_(model, "bireal")
    x = torch.randn(6, 4, dtype=dtype)
    model(x).sum().backward()
    assert model.eval()(x).dtype == dtype


ERRORS = {
    "unknown method": (network, "xnor", {}, "no method is called 'xnor': did you mean xnor_net?"),
    "unknown method of an override": (network, "bnn", {"head": "xnor"}, "no method is called 'xnor'"),
    "override of nothing": (network, "bnn", {"fc*": None}, "override 'fc\\*' matches no layer; layers: features.0, "),
    "override of a norm": (network, "bnn", {"features.3": None}, "override 'features.3' matches no layer"),
    "no layer": (lambda: nn.Sequential(nn.ReLU()), "bnn", {}, "no Conv1d, Conv2d, Conv3d or Linear inside"),
    "a single layer": (lambda: nn.Linear(2, 2), "bnn", {}, "wrap a single layer in nn.Sequential"),
    "a second time": (lambda: _quantized("bnn"), "bnn", {}, "inside the model are quantized already"),
    "a method that was not called": (network, methods.registry["bnn"], {}, "is no method; give a name or a Method"),
    "override with no method": (network, "bnn", {"features.0": False}, "False is no method; give a name or a Method"),
    "overrides without methods": (network, "bnn", ["features.0"], "must map layers' names to methods or None"),
}


def _quantized(method: str) -> nn.Module:
    model = network()
    quantize_(model, method)
    return model


@pytest.mark.parametrize(("make", "method", "overrides", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_leave_the_model_alone(make, method, overrides, message):
    model = make()
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message):
        quantize_(model, method, overrides)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_override_names_a_layer_whose_name_is_a_pattern_too():
    model = nn.ModuleDict({f"c[{i}]": nn.Linear(2, 2) for i in range(3)})
    reports = quantize_(model, "bnn", {"c[1]": None})
    assert [report.bits_w for report in reports] == [1, 32, 1]


def test_resolve_method():
    method = methods.registry["bnn"]()
    assert resolve_method(method) is method
    assert resolve_method("bnn").name == "bnn"


def test_the_package_offers_it():
    assert lowbit.quantize_ is quantize_

"""Folded batch norms: the same function, fewer modules; what cannot be folded stays."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import UsageError
from lowbit.layers import fold_batch_norms_
from lowbit.methods.affine import AffineWeight


def awkward_(norm: nn.Module) -> nn.Module:
    """Statistics far from 0 and 1, gamma of either sign and 0."""
    norm.running_mean.normal_(0, 2)
    norm.running_var.uniform_(0.1, 3)
    if norm.affine:
        with torch.no_grad():
            norm.weight.normal_()
            norm.weight[0] = 0
            norm.bias.normal_()
    return norm


PAIRS = {
    "conv1d": (nn.Conv1d(3, 5, 2), nn.BatchNorm1d(5), (2, 3, 6)),
    "conv2d": (nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5, eps=0.1), (2, 3, 6, 6)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv2d, norm without weights": (nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, affine=False), (2, 3, 6, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
    "linear": (nn.Linear(7, 5), nn.BatchNorm1d(5), (4, 7)),
    "linear without bias": (nn.Linear(7, 5, bias=False), nn.BatchNorm1d(5), (4, 7)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_function_stays_the_same(name):
    layer, norm, shape = copy.deepcopy(PAIRS[name])
    model = nn.Sequential(layer, awkward_(norm), nn.ReLU()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    assert fold_batch_norms_(model) == ["1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(model[1], nn.Identity)
    assert model[0] is layer
    assert isinstance(layer.bias, nn.Parameter)


class Net(nn.Module):
    """Calls in a forward of its own; every place where a norm has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pooled, self.after_pool = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.left, self.right = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.read_twice, self.one_reader = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.of_the_batch, self.untracked = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.in_front = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = self.after_pool(nn.functional.max_pool2d(self.pooled(x), 2))
        x = self.left(self.shared(x)) + self.right(self.shared(x))
        y = self.read_twice(x)
        x = self.untracked(self.of_the_batch(self.one_reader(y) + y))
        return self.last(self.in_front(x))


def test_what_cannot_be_folded_stays():
    model = Net().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            awkward_(module)
    model.eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    assert fold_batch_norms_(model) == ["first_norm"]
    torch.testing.assert_close(model(x), expected)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == {"after_pool", "left", "right", "one_reader", "untracked", "in_front"}


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), awkward_(nn.BatchNorm2d(4))
        self.alias = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_a_norm_under_two_names_goes_from_both():
    model = Aliased().eval()
    assert len(fold_batch_norms_(model)) == 1
    assert isinstance(model.norm, nn.Identity)
    assert isinstance(model.alias, nn.Identity)


class Branching(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_what_is_quantized_or_branches_is_refused_and_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    branching = Branching(*copy.deepcopy(model))
    with pytest.raises(UsageError, match=r"torch\.fx cannot trace the model"):
        fold_batch_norms_(branching)
    assert isinstance(branching[1], nn.BatchNorm2d)
    lowbit.quantize_(model, "affine")
    with pytest.raises(UsageError, match="fold its batch norms before quantize_"):
        lowbit.fold_batch_norms_(model)
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_scale_for_each_channel_makes_folding_unnecessary(bits):
    """The codes of the folded weight are those of the weight, mirrored where gamma is below 0."""
    layer, norm = nn.Conv2d(3, 16, 3, bias=False), awkward_(nn.BatchNorm2d(16))
    before, grid = AffineWeight(bits).encode(layer.weight)
    model = nn.Sequential(layer, norm).eval()
    fold_batch_norms_(model)
    after, folded_grid = AffineWeight(bits).encode(layer.weight)
    half = 1 << (bits - 1)
    falls = (norm.weight < 0).reshape(-1, 1, 1, 1)
    expected = torch.where(falls, 2 * half - before.int(), before.int())
    # Folding rounds: a weight halfway between two codes may go to the other.
    assert ((after.int() - expected).abs()[1:] <= 1).all()
    assert (after.int() != expected)[1:].float().mean() < 0.01
    factor = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded_grid.scale.flatten()[1:], (grid.scale.flatten() * factor)[1:])


def test_a_weight_that_is_not_the_layers_own_stays():
    """A hook would put the weight before folding back; the other holder of a tied one would compute something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends its parametrization
        normed = nn.utils.weight_norm(nn.Conv2d(3, 3, 1))
    one, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    other.weight = one.weight
    parts = [part for layer in (normed, one, other) for part in (layer, awkward_(nn.BatchNorm2d(3)))]
    model = nn.Sequential(*parts).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert fold_batch_norms_(model) == []
    torch.testing.assert_close(model(x), expected)


class ReadsByHand(nn.Module):
    """Its forward reads the weight of a layer that it calls, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = awkward_(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


def test_a_weight_that_forward_reads_itself_stays():
    model = ReadsByHand().eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert fold_batch_norms_(model) == []
    torch.testing.assert_close(model(x), expected)

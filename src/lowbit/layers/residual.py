"""Residual units: a branch of blocks beside a shortcut, and their sum."""

from __future__ import annotations

from torch import Tensor, nn


class Shortcut(nn.Sequential):
    """The way past the branch of a `Residual`; without modules it is the identity.

    Methods may leave its layers in float (`lowbit.methods.Method.skip_shortcuts`).
    """


class Residual(nn.Module):
    r"""$\mathrm{act}(\mathrm{branch}(x) + \mathrm{shortcut}(x))$, a sum of floats.

    The activation that ends the branch, or has only a max-pool behind it, with which it could change places, is taken
    out of the last block and stands behind the sum. So the order of the blocks says which unit this is: blocks that end
    with an activation (conv-bn-act) give the unit of 2015. Blocks that end with a convolution (bn-act-conv) give the
    pre-activation unit of 2016, and those that end with a batch norm (conv-bn, whose activation is the quantizer of the
    next layer) the unit of Bi-Real Net: in both the sum goes on as it is.

    Args:
        branch: blocks of `lowbit.layers.blocks`, in order.
        shortcut: gives the shape that the branch gives. The activation that ends its last block is dropped, and so is
            the learned shift in front of a block's sign.

    Source: He, Zhang, Ren and Sun 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, figure 2,
    and 2016, "Identity Mappings in Deep Residual Networks", arXiv 1603.05027; Liu et al. 2018, "Bi-Real Net", arXiv
    1808.00278.
    """

    def __init__(self, branch: nn.Sequential, shortcut: Shortcut) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.act = _take_activation(branch)
        _take_activation(shortcut)
        for block in shortcut:
            if isinstance(block, nn.Sequential) and hasattr(block, "shift"):
                del block.shift

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.act(self.branch(x) + self.shortcut(x))
        return total


class Repeat(nn.Module):
    """Each channel ``times`` times: (N, C, H, W) to (N, C * times, H, W), output channel ``c`` is ``c // times``.

    So a shortcut without parameters goes past a convolution that has more channels behind it.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        # In this order a tensor that is channels-last stays so, in one copy.
        copies = x.permute(0, 2, 3, 1).unsqueeze(-1).expand(-1, -1, -1, -1, self.times)
        return copies.reshape(n, height, width, channels * self.times).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return str(self.times)


def _take_activation(way: nn.Sequential) -> nn.Module:
    """The activation behind the norm or convolution that ends the last block of ``way``, taken out; or the identity."""
    parts = [name for name, _ in way[-1].named_children() if name != "pool"] if len(way) else []
    if parts[-1:] != ["act"]:
        return nn.Identity()
    act = way[-1].get_submodule("act")
    del way[-1].act
    return act

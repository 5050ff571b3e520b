"""Start from the weights of another run or file: take what fits, say what does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lowbit import methods
from lowbit.errors import LowbitError, UsageError
from lowbit.files import sha256_of
from lowbit.methods import Method
from lowbit.quantizers.observers import Observer
from lowbit.runs import Run


@dataclass(frozen=True)
class InitReport:
    """Names of tensors, by what became of them.

    Attributes:
        source: the file that was read.
        sha256: of its bytes, in hexadecimal.
        loaded: taken over.
        reshaped: in both, with different shapes; left as the model was made.
        missing: in the model only; left as the model was made.
        unused: in the file only.
        norms: norms that would fit by name, but stand in another place of their block; left as the model was made.
        quantizers: what quantizers have learnt, from a run of another method or of other bits; left as the model was
            made.
    """

    source: str
    sha256: str
    loaded: tuple[str, ...]
    reshaped: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    norms: tuple[str, ...]
    quantizers: tuple[str, ...]

    def __str__(self) -> str:
        total = sum(map(len, (self.loaded, self.reshaped, self.missing, self.norms, self.quantizers)))
        parts = [f"{len(self.loaded)} of {total} tensors taken from {self.source}"]
        for names, what in (
            (self.reshaped, "left out for their shape"),
            (self.norms, "left out because the two networks put their norms in different places"),
            (self.quantizers, "left out because that run has another method or other bits"),
            (self.missing, "not in the file"),
            (self.unused, "in the file but not in the model"),
        ):
            if names:
                shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                parts.append(f"{what}: {shown}")
        return "; ".join(parts)


def init_from(model: nn.Module, source: str | Path) -> InitReport:
    """Copy into ``model`` what fits by name and shape.

    Batch norms are taken all or none: when one of them has another shape or name, the two networks put their norms in
    different places of the block (before the convolution or after it), and equal names mean different things. The last
    one alone may have another shape, that of other classes. What quantizers have learnt (steps, levels) is taken from
    runs of the same method and bits only.

    Args:
        model: changed in place.
        source: a run folder or a safetensors file.

    Raises:
        UsageError: there is no such run or file, or the run has not finished.
        LowbitError: the file is malformed, or nothing in it fits.
    """
    path = Path(source)
    if path.is_dir():
        path = Run.of_option("--init-from", path).weights_path
    try:
        found = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UsageError(
            f"--init-from {source}: {path} does not exist; give a finished run or a .safetensors file"
        ) from None
    except (SafetensorError, OSError) as error:
        raise LowbitError(f"--init-from {source}: {path} is no safetensors file ({error})") from None
    own = model.state_dict()
    fitting = [name for name in own if name in found and own[name].shape == found[name].shape]
    norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
    in_norms = [name for name in own if name.rpartition(".")[0] in norms]
    # Of other classes the last norm has another shape.
    norms_fit = all(name in fitting or (name in found and name.startswith(f"{norms[-1]}.")) for name in in_norms)
    in_quantizers = {name for name in fitting if "_quantizer." in name} if _other_bits(model, path) else set()
    loaded = [name for name in fitting if (norms_fit or name not in in_norms) and name not in in_quantizers]
    if not loaded:
        raise LowbitError(f"--init-from {source}: none of its {len(found)} tensors fits the model by name and shape")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(found[name])
    return InitReport(
        source=str(path),
        sha256=sha256_of(path),
        loaded=tuple(loaded),
        reshaped=tuple(name for name in own if name in found and name not in fitting),
        missing=tuple(name for name in own if name not in found),
        unused=tuple(sorted(set(found) - set(own))),
        norms=tuple(name for name in fitting if name in in_norms and not norms_fit),
        quantizers=tuple(name for name in fitting if name in in_quantizers),
    )


def rest_of(source: str | Path | None) -> dict[str, Any] | None:
    """What config.json of a run says of the layers that its method leaves in float, once they are low-bit.

    A run that starts from those weights keeps these layers as they are.

    Args:
        source: the run's folder or its weights, another file, or None.
    """
    if source is None:
        return None
    run = Run.of(source)
    return run.config.get("rest") if run.config_path.is_file() else None


def check_ranges(model: nn.Module, source: str | Path) -> None:
    """Refuse weights of ``source``, which has been calibrated, whose ranges of activations do not fit ``model``.

    Raises:
        UsageError: a range was not taken over.
    """
    for name, module in model.named_modules():
        if isinstance(module, Observer) and not module.batches:
            raise UsageError(
                f"--init-from {source}: the layers that its method leaves in float are low-bit there, and the range of "
                f"'{name}' does not fit this run; keep its model, method and bits, or start from the run that it was "
                "calibrated from"
            )


def _other_bits(model: nn.Module, weights: Path) -> bool:
    """Whether ``weights`` are those of a run whose method is not the model's, or has other bits than it."""
    run = Run.of(weights)
    mine: Method | None = getattr(model, "method", None)
    if mine is None or not run.config_path.is_file():
        return False
    try:
        said = run.config["method"]
        theirs = methods.registry[said["name"]](**said["options"])
    except (LowbitError, TypeError):
        return True
    return (theirs.name, theirs.bits_w, theirs.bits_a) != (mine.name, mine.bits_w, mine.bits_a)

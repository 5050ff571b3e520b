"""The state to resume from: written whole or not at all, read without running code."""

from __future__ import annotations

import io
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError, briefly
from lowbit.files import write_whole


@dataclass
class Checkpoint:
    """Everything that the next epoch depends on. Randomness is not in it: epoch e draws from (seed, e) alone.

    Attributes:
        model, optimizer: state dictionaries at the end of the last finished epoch.
        rows: one row of metrics per finished epoch.
        diagnostics: one row of diagnostics per finished epoch, when the run is diagnosed.
        average: state of the averaged weights, once the run averages them.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rows: list[dict[str, float]]
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all.

        Raises:
            LowbitError: the disk is full; an earlier checkpoint under this name is untouched.
        """
        buffer = io.BytesIO()
        torch.save({entry.name: getattr(self, entry.name) for entry in fields(self)}, buffer)
        with write_whole(path) as file:
            file.write(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint; only tensors and plain values are accepted.

        Raises:
            LowbitError: the file is missing or damaged.
            PermissionError: it may not be read.
        """
        try:
            checkpoint = cls(**torch.load(path, map_location="cpu", weights_only=True))
            for entry, kind in typing.get_type_hints(cls).items():
                if not isinstance(getattr(checkpoint, entry), typing.get_origin(kind)):
                    raise TypeError(f"its {entry} is no {typing.get_origin(kind).__name__}")
            return checkpoint
        except PermissionError:
            raise
        except Exception as error:  # whatever the unpickler stumbles over in foreign bytes
            raise LowbitError(
                f"checkpoint {path} cannot be read ({briefly(error)}); train again with another --out"
            ) from None


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as safetensors, whole or not at all; what two names share is written twice."""
    state = model.state_dict()
    tensors = {name: own.detach().cpu().clone(memory_format=torch.contiguous_format) for name, own in state.items()}
    with write_whole(path) as file:
        file.write(safetensors.torch.save(tensors))

"""Make a model by name, in the block order of a method, quantized by it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowbit import methods
from lowbit.convert import quantize_, resolve_method
from lowbit.errors import LowbitError, UsageError, briefly
from lowbit.layers import quantized_layers
from lowbit.layers.blocks import BLOCKS
from lowbit.methods import Method
from lowbit.quantizers.observers import Observer
from lowbit.registry import Registry
from lowbit.runs import Run

# A model's function takes the given ones from `create`; what it takes beyond them are the user's options.
registry: Registry[Callable[..., nn.Module]] = Registry(
    "lowbit.models", "model", given=("block", "num_classes", "in_channels", "image_size")
)


def check_image_size(what: str, image_size: int, smallest: int) -> None:
    """Refuse images too small for every map of ``what`` to have a pixel.

    Raises:
        UsageError: ``image_size`` is below ``smallest``.
    """
    if image_size < smallest:
        raise UsageError(f"{what} needs images of at least {smallest}x{smallest}, not {image_size}x{image_size}")


def create(
    name: str,
    num_classes: int = 10,
    method: str | Method = "float",
    *,
    in_channels: int = 3,
    image_size: int = 32,
    method_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """The model ``name``, its blocks in the order of ``method``, quantized by it.

    Args:
        name: registered name, such as ``"vgg16"``.
        num_classes: outputs of the last layer.
        method: registered name or a `Method`.
        in_channels, image_size: of the input (N, in_channels, image_size, image_size).
        method_options: keyword arguments of the method, such as ``{"gradient": "paper"}``.
        options: keyword arguments of the model, such as ``width``.

    Returns:
        A module with the attribute ``method``; logits are (N, num_classes).

    Raises:
        UsageError: an unknown model, method or option, or an image that the model does not take.
    """
    if method_options:
        if isinstance(method, Method):
            raise UsageError("method_options go with a method's name; this method is made already")
        methods.registry.check_options(method, method_options)
        method = methods.registry[method](**method_options)
    method = resolve_method(method)
    registry.check_options(name, options)
    if not options.get("width", 1) > 0:
        raise UsageError(f"option 'width' of model '{name}' is {options['width']}, but must be above 0")
    model = registry[name](
        BLOCKS[method.block], num_classes=num_classes, in_channels=in_channels, image_size=image_size, **options
    )
    quantize_(model, method)
    for layer in quantized_layers(model):
        if method.initialise is not None:
            method.initialise(layer.weight)
        elif getattr(layer.weight_quantizer, "bits", None) == 1 and _has_zeros(layer.weight):
            # A start that is mostly zeros, such as the identity, has no signs.
            layer.reset_parameters()
    model.method = method  # type: ignore[assignment]
    return model


def _has_zeros(weight: Tensor) -> bool:
    """Whether a number is 0; on the meta device there are none."""
    return not (weight.is_meta or weight.all())


def load_run(path: str | Path) -> nn.Module:
    """The trained model of a run folder, in ``eval()``.

    Raises:
        LowbitError: the folder has no finished weights, or they do not fit its configuration.
    """
    run = Run.open(path)
    config = run.config
    try:
        for key in ("num_classes", "in_channels"):
            if type(config[key]) is not int or config[key] < 1:
                raise ValueError(f"{key} is {config[key]!r}")
        model = create(
            config["model"]["name"],
            num_classes=config["num_classes"],
            method=config["method"]["name"],
            in_channels=config["in_channels"],
            image_size=config.get("image_size", 32),
            method_options=config["method"]["options"],
            **config["model"]["options"],
        )
        if "rest" in config:
            quantize_rest_(model, config["rest"])
    except LowbitError:
        raise
    # RuntimeError: of too much memory, too; OverflowError: of a width without end.
    except (TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise LowbitError(f"{run.config_path} is damaged ({briefly(error)}); train again with another --out") from None
    load_weights(model, run.weights_path)
    return model.eval()


def quantize_rest_(model: nn.Module, rest: Mapping[str, Any]) -> None:
    """Quantize what the method of ``model`` has left in float by another one, as config.json names it (``rest``).

    Ranges of its activations are those that a calibration has found: training leaves them as they are.
    """
    quantize_(model, methods.registry[rest["name"]](**rest["options"]))
    for module in model.modules():
        if isinstance(module, Observer):
            module.frozen = True


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into ``model``; every tensor must fit.

    Raises:
        LowbitError: the file is missing, malformed, or does not fit; the model is then unchanged.
        PermissionError: it may not be read.
    """
    try:
        state = safetensors.torch.load_file(path)
    except FileNotFoundError:
        if path.exists():  # as it is called where it may not be read
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)) from None
        raise LowbitError(
            f"{path} does not exist: it was taken away, or the run has not finished (`lowbit train --resume` goes on)"
        ) from None
    except (SafetensorError, OSError) as error:
        raise LowbitError(
            f"{path} is no safetensors file, or a damaged one ({error}); restore it, or train again"
        ) from None
    expected = model.state_dict()
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or expected[name].shape != state[name].shape
    )
    if wrong:
        raise LowbitError(f"{path} does not fit the model: tensor '{wrong[0]}' and {len(wrong) - 1} more differ")
    model.load_state_dict(state)

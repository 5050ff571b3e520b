"""What the command line says, as the library takes it: data sets, settings of methods, a whole training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.data import ImageData
    from lowbit.training import TrainConfig


def load_data(
    source: Path, data: str | None = None, data_dir: Path | None = None, image_size: int | None = None
) -> ImageData:
    """The data set named on the command line, else the one that ``source`` was trained on."""
    from lowbit import data as data_sets
    from lowbit.runs import check_source

    check_source(source)
    if data is not None:
        return data_sets.load(data, data_dir, image_size)
    used = _data_of(source)
    if used is None:
        raise UsageError(f"{source} does not say what it was trained on; name a data set with --data")
    return data_sets.load(used["spec"], data_dir or used.get("data_dir"), image_size or used.get("image_size"))


def _data_of(source: Path) -> dict[str, Any] | None:
    from lowbit.runs import Run

    if source.suffix == ".lowbit" and source.is_file():
        from lowbit.packed import read

        found = (read(source).provenance or {}).get("data")
    else:
        found = Run.open(Run.of(source).path).config.get("data")
    kinds = {"spec": str, "data_dir": str | None, "image_size": int | None}
    sound = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    return found if sound else None


def with_bits(settings: Sequence[str] | None, **bits: int | None) -> list[str]:
    """``--set`` strings, joined by those that ``--bits-w`` and its like are short for."""
    return [*(settings or []), *(f"{key}={value}" for key, value in bits.items() if value is not None)]


def parse_settings(
    method: str, model: str, settings: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """``--set`` strings, sorted into options of the method, of the model and fields of the recipe."""
    from lowbit.methods import registry as method_registry
    from lowbit.models import registry as model_registry
    from lowbit.registry import parse_value
    from lowbit.training.settings import RECIPE_FIELDS

    texts: dict[str, dict[str, str]] = {"method": {}, "model": {}, "recipe": {}}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set takes KEY=VALUE, not '{setting}'")
        owner, dot, option = key.partition(".")
        into, option = (texts[owner], option) if dot and owner in texts else (texts["method"], key)
        if into.get(option, value) != value:
            raise UsageError(f"{key} is given twice, as {into[option]} and as {value}; leave one out")
        into[option] = value
    for key in texts["recipe"]:
        if key not in RECIPE_FIELDS:
            raise UsageError(f"a recipe has no field '{key}'; its fields: {', '.join(RECIPE_FIELDS)}")
    return (
        method_registry.parse_options(method, texts["method"]),
        model_registry.parse_options(model, texts["model"]),
        {key: parse_value(text, RECIPE_FIELDS[key], f"recipe field '{key}'") for key, text in texts["recipe"].items()},
    )


def train_config(
    out: Path, resume: bool, settings: Sequence[str], recipe_fields: Mapping[str, Any], **fields: Any
) -> TrainConfig:
    """What ``lowbit train`` is asked for; ``--resume`` and no other option takes the settings of the run in ``out``.

    Args:
        settings: ``--set`` strings.
        recipe_fields: options that change a field of the recipe; None where one was not given.
        fields: options that are fields of `TrainConfig`; None where one was not given.

    Raises:
        UsageError: the method, the model or the data set is missing, or a setting is none of theirs or has no effect.
    """
    from lowbit import methods
    from lowbit.runs import Run
    from lowbit.training import TrainConfig
    from lowbit.training.settings import check_effect, choose_recipe

    overrides = {name: value for name, value in recipe_fields.items() if value is not None}
    given = {name: value for name, value in fields.items() if value is not None}
    if resume and not (settings or overrides or given) and Run(out).config_path.is_file():
        return TrainConfig.resuming(out)
    for name, listing in (("method", "methods"), ("model", "models"), ("data", "datasets")):
        if name not in given:
            raise UsageError(f"--{name} is missing; `lowbit {listing}` lists the choices")
    of_method, of_model, of_recipe = parse_settings(given["method"], given["model"], settings)
    for name in of_recipe.keys() & overrides.keys():
        if of_recipe[name] != overrides[name]:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is {overrides[name]} and recipe.{name} is {of_recipe[name]}, which are the same setting; "
                "leave one out"
            )
    config = TrainConfig(
        out=out,
        resume=resume,
        method_options=of_method,
        model_options=of_model,
        overrides=of_recipe | overrides,
        **given,
    )
    if not resume:
        method = methods.registry[config.method](**of_method)
        _, recipe = choose_recipe(method, config)
        check_effect(method, recipe, config.overrides, taught=config.distill_from is not None)
    return config

"""What a study's TOML file asks for: read, checked, and spread out into rows, before anything runs."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit import data as data_sets
from lowbit import methods, models
from lowbit.errors import UsageError, check_choice
from lowbit.methods import Method, Recipe
from lowbit.quantizers.observers import Observer
from lowbit.registry import check_value
from lowbit.runs import Run
from lowbit.study.folder import state
from lowbit.study.table import Table, check_known, naming
from lowbit.training import TrainConfig
from lowbit.training.environment import PRECISIONS
from lowbit.training.settings import RECIPE_FIELDS, check_effect, choose_recipe

# Epochs have a key of their own.
ROW_FIELDS = {name: kind for name, kind in RECIPE_FIELDS.items() if name != "epochs"}


@dataclass(frozen=True, eq=False)
class Row:
    """One run of a study.

    Attributes:
        name: of the row.
        data, model: short names of these, with their options.
        label: data, model, seed and name: the run folder's place in the study's folder.
        config: the settings; ``out`` is the run folder.
        method: made with its options.
        source: the row whose weights this one starts from, or None.
        teacher: the row whose logits this one learns from, or None for the labels alone.
        calibrate: None trains the row; a number calibrates it from ``source`` with so many train images.
        rest: the method of the layers that its own leaves in float, and its options, as config.json has them, of a row
            that is calibrated from a low-bit one, or starts from such a row; else None.
    """

    name: str
    data: str
    model: str
    label: str
    config: TrainConfig
    method: Method
    source: Row | None
    teacher: Row | None
    calibrate: int | None
    rest: Mapping[str, Any] | None

    @property
    def needs(self) -> tuple[Row, ...]:
        """The rows that must be done before this one can start."""
        return tuple(row for row in (self.source, self.teacher) if row is not None)

    @property
    def run(self) -> Run:
        return Run(Path(self.config.out))

    def to_dict(self) -> dict[str, Any]:
        """What `lowbit study --dry-run` shows."""
        return {
            "row": self.name,
            "data": self.data,
            "model": self.model,
            "seed": self.config.seed,
            "W": self.method.bits_w,
            "A": self.method.bits_a,
            "G": self.method.bits_g,
            "starts from": "scratch" if self.source is None else self.source.name,
            "taught by": "" if self.teacher is None else self.teacher.name,
            "epochs": self.epochs,
            "state": self.state,
        }

    @property
    def state(self) -> str:
        """``to do``, ``epoch 3 of 8``, ``trained`` (but not evaluated and exported) or ``done``."""
        return state(self.run, self.epochs)

    @property
    def epochs(self) -> int:
        """Of training; 0 for a row that is calibrated."""
        return choose_recipe(self.method, self.config)[1].epochs if self.calibrate is None else 0


@dataclass(frozen=True)
class Study:
    """A checked study: its file, the folder that everything goes to, and the rows, each below those that it needs.

    The rows of the first seed come first, so that a study that is stopped early is a smaller study.
    """

    path: Path
    out: Path
    rows: tuple[Row, ...]


def read_study(path: str | Path) -> Study:
    """Read and check a study.

    Raises:
        UsageError: the file is missing or no TOML, or says something that cannot be done; the message names the file,
            the entry and the mend.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give the TOML file of a study") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    top = Table(document, str(path))
    out = Path(top.take("out", str))
    if out.exists() and not out.is_dir():
        raise UsageError(f"{path}: out is {out}, which is a file; name a folder")
    sets = [_data(entry, str(path)) for entry in top.take_list("data", str | dict)]
    nets = [_model(entry, str(path)) for entry in top.take_list("model", str | dict)]
    seeds = top.take_list("seeds", int, [0])
    if any(seed < 0 for seed in seeds):
        raise UsageError(f"{path}: seeds must be at least 0")
    precision = top.take("precision", str, "auto")
    with naming(str(path)):
        check_choice("precision", precision, ("auto", *PRECISIONS))
    common = TrainConfig(
        out=out,
        epochs=top.take("epochs", int, None),
        overrides=_fields(top.take("recipe", dict, {}), f"{path}: recipe"),
        precision=precision,
        val_fraction=top.take("val_fraction", float, 0.0),
    )
    if not 0 <= common.val_fraction < 1:
        raise UsageError(f"{path}: val_fraction is {common.val_fraction}, but must be at least 0 and below 1")
    entries = top.take_list("run", dict)
    top.finish()
    planned: list[_Planned] = []
    for number, entry in enumerate(entries, 1):
        planned += _plan(entry, f"{path}, run {number}", common, planned, several=len(nets) > 1)
    for what, names in (
        ("data", [name for name, _ in sets]),
        ("model", [name for name, _ in nets]),
        ("seeds", seeds),
    ):
        if len(set(names)) < len(names):
            raise UsageError(f"{path}: {what} names {_first_twice(names)} twice; name it once")
    # By label: a row with a model of its own is made once, and stands beside those of every model.
    rows: dict[str, Row] = {}
    for seed, (data_label, of_data), net in itertools.product(seeds, sets, nets):
        cell: dict[str, Row] = {}
        for entry in planned:
            model_label, of_model = entry.model or net
            label = f"{data_label}/{model_label}/seed-{seed}/{entry.name}"
            source, teacher = (None if name is None else cell[name] for name in (entry.init_from, entry.distill_from))
            config = replace(
                entry.config,
                out=out / label,
                seed=seed,
                init_from=None if source is None else source.config.out,
                distill_from=None if teacher is None else teacher.config.out,
                **of_data,
                **of_model,
            )
            row = Row(
                name=entry.name,
                data=data_label,
                model=model_label,
                label=label,
                config=config,
                method=entry.method,
                source=source,
                teacher=teacher,
                calibrate=entry.calibrate,
                rest=entry.rest,
            )
            cell[entry.name] = rows.setdefault(label, row)
    return Study(path, out, tuple(rows.values()))


@dataclass(frozen=True)
class _Planned:
    """A row before data, model and seed are chosen."""

    name: str
    config: TrainConfig
    method: Method
    model: tuple[str, dict[str, Any]] | None  # its own
    init_from: str | None
    distill_from: str | None
    calibrate: int | None
    rest: Mapping[str, Any] | None
    identity: object


def _plan(
    entry: Mapping[str, Any], where: str, common: TrainConfig, above: Sequence[_Planned], several: bool
) -> list[_Planned]:
    """The rows that one ``[[run]]`` stands for.

    Args:
        above: those of the entries before it.
        several: whether the study has several models, so that a row without one of its own stands for several.
    """
    method = entry.get("method")
    if isinstance(method, str):
        where += f" ({method})"
    table = Table(entry, where)
    method = table.take("method", str)
    name = table.take("name", str, None)
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"{where}: name is '{name}', but must be made of letters, digits, '.', '-' and '_'")
    if name is not None and name.endswith(".log"):
        raise UsageError(f"{where}: name is '{name}', but logs of rows are called so; leave '.log' out")
    options = table.take("options", dict, {})
    grid = table.take("grid", dict, {})
    starts = {key: table.take(key, str, None) for key in ("init_from", "distill_from")}
    calibrate = table.take("calibrate", int, None)
    model = _model(table.take("model", str | dict), where) if "model" in entry else None
    config = replace(common, method=method, diagnose=table.take("diagnose", bool, False), overrides={})
    fields: dict[str, Any] = {}
    if calibrate is None:
        recipe_name, fields = _recipe(table.take("recipe", str | dict, {}), f"{where}: recipe")
        overrides = {**common.overrides, **fields}
        config = replace(
            config, recipe=recipe_name, overrides=overrides, epochs=table.take("epochs", int, common.epochs)
        )
    table.finish()
    sources = {planned.name: planned for planned in above}
    with naming(where):
        for key, start in starts.items():
            _check_start(key, start, sources, shared=model is None or not several)
        source = sources.get(starts["init_from"] or "")
        if calibrate is not None:
            _check_calibrated(calibrate, source)
            if model is not None or starts["distill_from"] is not None or config.diagnose:
                raise UsageError("a calibrated row is not trained; leave distill_from, diagnose and model out")
            model = source.model if source is not None else None
    rows: list[_Planned] = []
    for point in _points(grid, options, where):
        with naming(where):
            chosen = methods.registry.check_values(method, {**options, **point})
            made = methods.registry[method](**chosen)
            config = replace(config, method_options=chosen)
            recipe = choose_recipe(made, config)[1]
            # Of the study's own fields not every row need make use.
            check_effect(made, recipe, fields, taught=starts["distill_from"] is not None)
            if calibrate is not None:
                _check_observed(made)
            else:
                _check_trained(made, recipe, config.diagnose)
            defaults = {key: option.default for key, option in methods.registry.options(method).items()}
            identity = (method, {**defaults, **chosen}, replace(recipe, source=""), starts, calibrate, model)
            label = _label(method, chosen) if name is None else _label(name, point)
            row = _Planned(label, config, made, model, **starts, calibrate=calibrate, rest=None, identity=identity)
            if source is not None and calibrate is not None and source.method.name != "float":
                row = _calibrated_rest(row, source)
            elif source is not None and source.rest is not None:
                row = _kept_rest(row, source)
        for other in (*above, *rows):
            if other.name == row.name:
                raise UsageError(f"{where}: a second row is called '{row.name}'; give this one another name")
            if other.identity == row.identity:
                raise UsageError(f"{where}: '{row.name}' is the same as '{other.name}' above; leave one of them out")
        rows.append(row)
    return rows


def _check_trained(method: Method, recipe: Recipe, diagnose: bool) -> None:
    if diagnose and method.weight is None and method.activation is None:
        raise UsageError(f"method '{method.name}' quantizes no layer: there is nothing to diagnose; leave it out")
    if method.weight is None or method.skip_first:
        return
    for field, does in (("whiten", "start"), ("freeze_first", "keep")):
        if getattr(recipe, field):
            raise UsageError(
                f"method '{method.name}' quantizes the first layer, which {field} would {does}; leave it out"
            )


def _check_start(key: str, name: str | None, sources: Mapping[str, _Planned], shared: bool) -> None:
    """Refuse a row to start from or to learn from that is not there, or stands for several where one is needed.

    Args:
        shared: whether there is one row for each model, as of the others.
    """
    if name is None:
        return
    if name not in sources:
        known = f"it can be {', '.join(sources)}" if sources else "there is none above this one"
        raise UsageError(f"{key} is '{name}', which is no row above this one; {known}")
    if not shared and sources[name].model is None:
        raise UsageError(f"{key} is '{name}', which is a row for each model; give that row a model of its own, too")


def _check_calibrated(images: int, source: _Planned | None) -> None:
    if images < 1:
        raise UsageError(f"calibrate is {images}, but must be at least 1, a number of train images")
    if source is None or source.calibrate is not None or source.rest is not None:
        raise UsageError("calibrate starts from a trained row without calibrated layers; name one by init_from")


def _calibrated_rest(row: _Planned, source: _Planned) -> _Planned:
    """A row of the method that ``source`` has, where what that leaves in float is of the method that ``row`` has."""
    own, options = source.method, row.config.method_options
    if not (own.skip_first or own.skip_last or own.skip_shortcuts):
        raise UsageError(f"method '{own.name}' of '{source.name}' leaves no layer in float to calibrate")
    if options.get("fold"):
        raise UsageError(f"fold is for float networks, and '{source.name}' is one of '{own.name}'; leave it out")
    config = replace(row.config, method=source.config.method, method_options=source.config.method_options)
    return replace(row, config=config, method=own, rest={"name": row.config.method, "options": options})


def _kept_rest(row: _Planned, source: _Planned) -> _Planned:
    """A row that starts from ``source``, which has calibrated layers beside those of its method, and keeps them."""
    theirs, own = ((planned.config.method, planned.config.method_options) for planned in (source, row))
    if theirs != own:
        raise UsageError(
            f"'{source.name}' is a network of '{source.method.name}' with calibrated layers beside, which a row that "
            "starts from it keeps; give the method of that network and its options"
        )
    return replace(row, rest=source.rest)


def _check_observed(method: Method) -> None:
    activation = None if method.activation is None else method.activation()
    if activation is None or not any(isinstance(module, Observer) for module in activation.modules()):
        raise UsageError(f"method '{method.name}' has nothing to calibrate; leave calibrate out and train it")


def _points(grid: Mapping[str, Any], options: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the values that ``grid`` lists."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}: grid.{key} is {values!r}, but must be a list of values")
        if key in options:
            raise UsageError(f"{where}: '{key}' stands in options and in grid; leave one of them out")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _data(entry: str | Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Short name of a data set, and its fields of a `TrainConfig`."""
    name, table = _named(entry, f"{path}: data")
    settings = {
        "data": name,
        "data_dir": table.take("data_dir", str, None),
        "image_size": table.take("image_size", int, None),
    }
    table.finish()
    kind, colon, folder = name.partition(":")
    with naming(f"{path}: data"):
        if not colon:
            data_sets.registry[name]
        elif kind != "folder" or not folder:
            raise UsageError(f"'{name}' is neither a data set's name nor folder:PATH")
    size = {} if settings["image_size"] is None else {"image_size": settings["image_size"]}
    return _label(f"{kind}-{Path(folder).name}" if colon else name, size), settings


def _model(entry: str | Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Short name of a model, and its fields of a `TrainConfig`."""
    name, table = _named(entry, f"{path}: model")
    with naming(f"{path}: model"):
        options = models.registry.check_values(name, table.values)
    return _label(name, options), {"model": name, "model_options": options}


def _recipe(entry: str | Mapping[str, Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """A recipe's name, if one is given, and the fields that are changed."""
    if isinstance(entry, str):
        return entry, {}
    table = Table(entry, where)
    return table.take("name", str, None), _fields(table.values, where)


def _fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a recipe, checked by type; their ranges are checked with the recipe of each row."""
    check_known(values, ROW_FIELDS, where)
    return {key: check_value(value, ROW_FIELDS[key], f"{where}.{key}") for key, value in values.items()}


def _label(name: str, options: Mapping[str, Any]) -> str:
    """``name`` and its options as a folder's name: ``dorefa-w1-a2``, ``hwgq-levels-lloyd_max``, ``bnn-stochastic``."""
    parts = [name]
    for key, value in options.items():
        if key.startswith("bits_"):
            parts.append(f"{key.removeprefix('bits_')}{value}")
        elif isinstance(value, bool):
            parts.append(key if value else f"no-{key}")
        else:
            parts.append(f"{key}-{value}")
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def _named(entry: str | Mapping[str, Any], where: str) -> tuple[str, Table]:
    """A name, or a table of a name and settings: the name, and the rest."""
    table = Table({"name": entry} if isinstance(entry, str) else entry, where)
    return table.take("name", str), table


def _first_twice(names: Sequence[Any]) -> Any:
    return next(name for position, name in enumerate(names) if name in names[:position])

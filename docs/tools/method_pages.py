"""One page per registered method, made from its docstring, its fields and by running its quantizers."""

from __future__ import annotations

import dataclasses
import functools
import html
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import griffe
import plots
import torch
from labels import set_off

from lowbit import methods
from lowbit.errors import LowbitError
from lowbit.layers.blocks import BLOCKS
from lowbit.methods import Method, Recipe
from lowbit.quantizers.base import Quantizer
from lowbit.runs import read_json
from lowbit.study.results import read_results, summarise, table, traced
from lowbit.terminal import plain

RESULTS = Path(__file__).parents[2] / "results" / "fashion_mnist"
"""Where the results of studies/fashion_mnist.toml are published."""
BIT_WIDTHS = (1, 2, 4)
"""Widths that are drawn for an option whose name starts with ``bits``."""


def overview() -> str:
    """The page that lists all methods."""
    made = [methods.registry[name]() for name in methods.registry]
    rows = [
        f"| [`{m.name}`]({m.name}.md) | {_bits(m.bits_w)} | {_bits(m.bits_a)} | {_bits(m.bits_g)} "
        f"| {m.title} | {_paper(m)} |"
        for m in made
    ]
    return "\n".join(
        [
            "# Methods",
            "",
            "What is registered in `lowbit.methods`, found by file when this site was built. W, A and G are the bits",
            "of weights, activations and gradients with the default options. The [survey](../survey.md) compares them.",
            "",
            "| name | W | A | G | title | source |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            _ABOUT_RECIPES.format(", ".join(f"`{m.name}`" for m in made if "paper" not in m.recipes)),
        ]
    )


_ABOUT_RECIPES = """## Recipes

How a method is trained is its recipe: optimizer, rates, epochs and so on. `default` is made for runs of some ten
epochs on small images. `paper` is the published recipe, or that of the authors' code, as far as it was found and the
[fields](../api/methods.md#lowbit.methods.base.Recipe) can say it; most take hundreds of epochs. Each method's page, and
`lowbit methods NAME`, shows both, what each comes from, and what the default changes and why. There is no `paper` for
{}.

```sh
lowbit train --method bnn --model vgg_small --data cifar10 --recipe paper --out runs/bnn-paper
lowbit train --method bnn --model vgg_small --data cifar10 --epochs 20 --set recipe.average=0.25 --out runs/bnn-average
```

With `average=0.25` the weights are averaged over all steps of the last quarter of the epochs: latent weights, norms
and learned levels; the batch norms' statistics are taken anew for the average. From there on metrics.csv, the choice of
the epoch and model.safetensors are those of the average, while `train_loss` and the diagnostics show the weights that
are trained. Of all recipes only `fast` of `reactnet` averages unasked. Sources: Polyak and Juditsky 1992, "Acceleration
of Stochastic Approximation by Averaging"; Izmailov et al. 2018, [arXiv 1803.05407](https://arxiv.org/abs/1803.05407).
"""


def page(name: str) -> str:
    """The Markdown page of the method ``name``."""
    function = methods.registry[name]
    method = function()
    text, meanings = _docstring(function)
    summary, _, rest = text.partition("\n\n")
    parts = [f"# {method.title}", f"`{name}` · {_paper(method)}", summary, set_off(rest)]
    parts += ["## What is quantized", _quantized(method)]
    drawings = [drawing for side in SIDES if (drawing := _drawing(name, side))]
    if drawings:
        parts += ["## Forward and backward, drawn by running the code", _HOW_DRAWN, *drawings]
    for side in ("weight", "activation"):
        parts += _quantizer_text(side, getattr(method, side))
    parts += ["## Options", _options(name, meanings), "## Recipes", _recipes(method)]
    parts += [*_measured(name), "## Use it", _use(name)]
    return "\n\n".join(part for part in parts if part)


_HOW_DRAWN = (
    "The quantizer ran on 801 evenly spaced numbers when this page was built; the gradient is autograd's, for an "
    "incoming gradient of 1. The dotted diagonal is the identity. The 801 weights are drawn as one filter, so a scale "
    "of the filter is taken over them. The gradient is that of each number with respect to itself: what a weight does "
    "to the others, through a common scale, is not in the picture."
)
SIDES = ("weight", "activation", "gradient")


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text of a docstring without its sections, and the meaning of each argument."""
    sections = griffe.Docstring(inspect.getdoc(function) or "").parse("google", warnings=False)
    text = "\n\n".join(s.value for s in sections if s.kind is griffe.DocstringSectionKind.text)
    meanings: dict[str, str] = {}
    for section in sections:
        if section.kind in (griffe.DocstringSectionKind.parameters, griffe.DocstringSectionKind.attributes):
            meanings |= {item.name: " ".join(item.description.split()) for item in section.value}
    return text, meanings


def _quantized(method: Method) -> str:
    def side(factory: Callable[[], Quantizer] | None) -> str:
        return "" if factory is None else f": `{_called(factory)}`"

    block = " ".join((inspect.getdoc(BLOCKS[method.block]) or "").split("\n\n")[0].split())
    rows = [
        ("weights", _bits(method.bits_w) + side(method.weight)),
        ("activations", _bits(method.bits_a) + side(method.activation)),
        ("gradients", _bits(method.bits_g)),
        ("first layer", "stays float" if method.skip_first else f"weights as above; it reads its {_input(method)}"),
        ("last layer", "stays float" if method.skip_last else "as above"),
        ("layers of shortcuts", "stay float" if method.skip_shortcuts else "as above"),
        ("block", f"`{method.block}`: {block}"),
        ("latent weights, after each step", "changed in place (see above)" if method.projection else "left alone"),
        ("loss", method.loss.replace("_", " ")),
    ]
    return "\n".join(
        ["| part | with the default options |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    )


def _input(method: Method) -> str:
    return "input as it is" if method.input is None else f"input through `{_called(method.input)}`"


def _drawing(name: str, side: str) -> str:
    """One side with the default options, and with every choice that changes its curves, as tabs."""
    drawn: list[tuple[str, plots.Curves]] = []
    same: list[str] = []
    for label, options in _variants(name):
        try:
            part = getattr(methods.registry[name](**options), side)
        except LowbitError:
            continue
        if part is None:
            continue
        torch.manual_seed(0)
        curves = _run(side, part)
        if not any(all(map(torch.equal, curves, others)) for _, others in drawn):
            drawn.append((label, curves))
        elif _is_choice(name, next(iter(options))):
            same.append(f"`{label}`")
    if not drawn:
        return ""
    blocks = [_figure(name, side, label, curves) for label, curves in drawn]
    if len(blocks) > 1:
        blocks = [f'=== "{label}"\n\n    {block}' for (label, _), block in zip(drawn, blocks, strict=True)]
    note = f"One of these curves is also that of {', '.join(same)}." if same else ""
    return "\n\n".join([f"### {side.capitalize()}s", *blocks, note])


def _is_choice(name: str, option: str) -> bool:
    return get_origin(methods.registry.options(name)[option].annotation) is Literal


def _run(side: str, part: Any) -> plots.Curves:
    if side == "gradient":
        return plots.run_gradient_quantizer(part)
    return plots.run_weight_quantizer(part()) if side == "weight" else plots.run_activation_quantizer(part())


def _figure(name: str, side: str, label: str, curves: plots.Curves) -> str:
    caption = f"<code>{name}</code>, {side}s, {html.escape(label)}."
    if side == "gradient":
        titles = "one draw: what goes on, over what arrives", f"mean of {plots.DRAWS} draws"
    else:
        symbol = "W" if side == "weight" else "x"
        titles = f"forward: q({symbol})", f"backward: ∂q/∂{symbol}"
    return plots.figure(curves, titles, f"{titles[0]}; {titles[1]}", caption)


def _variants(name: str) -> list[tuple[str, dict[str, Any]]]:
    variants: list[tuple[str, dict[str, Any]]] = [("default options", {})]
    for option in methods.registry.options(name).values():
        choices: tuple[Any, ...] = ()
        if get_origin(option.annotation) is Literal:
            choices = get_args(option.annotation)
        elif option.annotation is bool:
            choices = (True, False)
        elif option.annotation is int and option.name.startswith("bits"):
            choices = BIT_WIDTHS
        variants += [
            (f"{option.name}={choice}", {option.name: choice}) for choice in choices if choice != option.default
        ]
    return variants


def _quantizer_text(side: str, factory: Callable[[], Quantizer] | None) -> list[str]:
    if factory is None:
        return []
    kind = type(factory())
    text, _ = _docstring(kind)
    return [f"## The {side} quantizer: `{kind.__name__}`", set_off(text)]


def _called(factory: Callable[[], Quantizer]) -> str:
    """The quantizer's class, with its arguments where the method binds them."""
    name = type(factory()).__name__
    if not isinstance(factory, functools.partial):
        return name
    arguments = [repr(a) for a in factory.args] + [f"{key}={value!r}" for key, value in factory.keywords.items()]
    return f"{name}({', '.join(arguments)})"


def _options(name: str, meanings: dict[str, str]) -> str:
    options = methods.registry.options(name)
    if not options:
        return "None."
    rows = [
        f"| `{o.name}` | {_type(o.annotation)} | `{o.default}` | {meanings.get(o.name, '')} |" for o in options.values()
    ]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
    return f"`{text}`".replace("|", "\\|")


def _recipes(method: Method) -> str:
    """A column for each recipe, a row for each field that is in effect in one of them, and where they come from."""
    settings = {key: recipe.settings() for key, recipe in method.named_recipes.items()}
    rows = [
        f"| {field.name} | {' | '.join(plain(each.get(field.name, '')) for each in settings.values())} |"
        for field in dataclasses.fields(Recipe)
        if any(field.name in each for each in settings.values())
    ]
    sources = [f"- `{key}`: {recipe.source}." for key, recipe in method.named_recipes.items()]
    head = [f"| field | {' | '.join(f'`{key}`' for key in settings)} |", "|---" * (len(settings) + 1) + "|"]
    return "\n\n".join([_HOW_TO_CHOOSE, "\n".join([*head, *rows]), "\n".join(sources)])


_HOW_TO_CHOOSE = (
    "`lowbit train --recipe NAME` takes another than `default`; `--set recipe.FIELD=VALUE` changes a "
    "[field](../api/methods.md#lowbit.methods.base.Recipe)."
)


def _measured(name: str) -> list[str]:
    """The method's rows of the study of all methods, below the float twin's; nothing before the study was run."""
    if not (RESULTS / "results.csv").is_file():
        return []
    results = read_results(RESULTS / "results.csv")
    rows = [row for row in summarise(results) if row.results and row.first.method in ("float", name)]
    if not any(row.first.method == name for row in rows):
        return []
    about = traced(results, read_json(RESULTS / "study.json"))
    return ["## Measured", f"On {rows[0].first.data}, {rows[0].first.model}: {about}", table(rows), _HOW_TO_READ]


_HOW_TO_READ = "[How to read the table](../studies.md#reading-the-table)."


def _use(name: str) -> str:
    setting = ""
    for option in methods.registry.options(name).values():
        if get_origin(option.annotation) is Literal:
            setting = f" --set {option.name}={get_args(option.annotation)[-1]}"
            break
    model = "patchnet" if name in ("bireal", "reactnet") else "lenet"
    return (
        f"```sh\nlowbit train --method {name} --model {model} --data digits --out runs/{name}{setting}\n```\n\n"
        f'```python\nlowbit.quantize_(model, "{name}")\n```'
    )


def _bits(bits: int) -> str:
    return "float" if bits == 32 else f"{bits} bit" + "s" * (bits > 1)


def _paper(method: Method) -> str:
    return f"[{method.paper}]({method.url})" if method.url else method.paper

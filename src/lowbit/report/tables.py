"""The parts of the page that need no script: sentences and tables, with every string from a file escaped."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lowbit.report.costs import Comparison
from lowbit.report.diagnostics import QUANTITIES, Diagnostics
from lowbit.report.gather import Entry, finite, settings, test_between
from lowbit.report.statistics import McNemar
from lowbit.terminal import alike

NOTHING = "&ndash;"
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4")
MARKERS = (
    '<circle cx="18" cy="7" r="3.6"/>',
    '<rect x="14.6" y="3.6" width="6.8" height="6.8"/>',
    '<path d="M18 2.4 22.4 10.4H13.6Z"/>',
    '<path d="M18 2 23 7 18 12 13 7Z"/>',
    '<path d="M13.6 3.6H22.4L18 11.6Z"/>',
)
COLOURS = 8
EVERY_PAIR_UP_TO = 8


def swatch(index: int) -> str:
    """The line and marker by which run ``index`` is drawn in the charts."""
    colour = f"var(--run-{index % COLOURS})"
    return (
        f'<svg class="swatch" viewBox="0 0 36 14" width="36" height="14" aria-hidden="true" style="color:{colour}">'
        f'<path d="M1 7H35" stroke-dasharray="{DASHES[index % len(DASHES)]}"/>{MARKERS[index % len(MARKERS)]}</svg>'
    )


def _run(index: int, entry: Entry) -> str:
    return f'<span class="run">{swatch(index)}{name(entry.label)}</span>'


def name(label: str) -> str:
    """A name from a file: escaped, and isolated from the direction of the text around it."""
    return f"<bdi>{escape(label)}</bdi>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """An HTML table whose first column are row headers; the cells are HTML already."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table class="{css}">'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def lead(entries: Sequence[Entry]) -> str:
    """The result in a sentence or a few: each run that was evaluated on the same images against the first."""
    evaluated = [entry for entry in entries if entry.evaluation]
    if not evaluated:
        return "No run has been evaluated yet: the page shows what their training has written so far."
    first, *others = evaluated
    assert first.evaluation is not None
    sentences = [
        f"<strong>{name(first.label)}</strong> classifies {percent(first.evaluation['accuracy'])} of "
        f"{first.evaluation['total']:,} test images correctly."
    ]
    for entry in [entry for entry in others if entry.data_hash == first.data_hash][:3]:
        assert entry.evaluation is not None
        points = 100 * (entry.evaluation["accuracy"] - first.evaluation["accuracy"])
        direction = "above" if points >= 0 else "below"
        sentence = (
            f"<strong>{name(entry.label)}</strong> reaches {percent(entry.evaluation['accuracy'])}, "
            f"{abs(points):.2f} points {direction} {name(first.label)}"
        )
        ratio = _ratio(_cost(first, "weight_bytes"), _cost(entry, "weight_bytes"))
        sentences.append(sentence + (f", with {ratio:.1f} times fewer bytes." if ratio and ratio > 1.05 else "."))
    return " ".join(sentences)


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """The section about several seeds: a table of rows with the same keys, whose strings are no HTML yet, without what
    is alike in all of them.
    """
    keys = [key for key in rows[0] if key not in {"row", *alike(rows)}]
    cells = ([name(str(row["row"])), *(escape(str(row[key])) for key in keys)] for row in rows)
    return (
        '<section aria-labelledby="seeds"><h2 id="seeds">Over seeds</h2>'
        f"{table(['Row', *map(escape, keys)], cells, 'numbers')}"
        '<p class="fine">&plusmn; is half the 95&nbsp;% interval of the mean over n seeds, by Student&rsquo;s t. p is '
        "of McNemar&rsquo;s test against the float twin of the same seed, one for each seed.</p></section>"
    )


def notes(entries: Sequence[Entry]) -> str:
    """What is missing, as a list; empty when nothing is."""
    items = [f"<li>{name(entry.label)} {_code(note)}.</li>" for entry in entries for note in entry.notes]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _code(sentence: str) -> str:
    """A sentence whose parts between backquotes are code."""
    parts = escape(sentence).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def summary(entries: Sequence[Entry]) -> str:
    """Accuracy, loss and cost of each run."""
    kinds = list(dict.fromkeys(kind for entry in entries for kind in _macs(entry)))
    head = ["Run", "Accuracy", "Loss", "Bits W &times; A", "Parameters", "Bytes"]
    rows = []
    for i, entry in enumerate(entries):
        result = entry.evaluation or {}
        macs = _macs(entry)
        stored = _cost(entry, "weight_bytes")
        ratio = _ratio(_cost(entry, "float32_bytes"), stored)
        loss = finite(result.get("loss"))
        rows.append(
            [
                f"{_run(i, entry)}<small>{_what(entry)}</small>",
                _accuracy(result) if result else NOTHING,
                NOTHING if loss is None else f"{loss:.4f}",
                _bits(max(macs, key=lambda kind: macs[kind])) if macs else NOTHING,
                _count(_cost(entry, "parameters")),
                _count(stored) + (f"<small>{ratio:.1f}&times; below float32</small>" if ratio and ratio > 1.05 else ""),
                *(_count(macs.get(kind)) for kind in kinds),
            ]
        )
    return table(head + [f"MACs {_bits(kind)}" for kind in kinds], rows, "numbers")


def _accuracy(result: dict[str, Any]) -> str:
    counts = f"{result['correct']:,} of {result['total']:,}"
    return f"<strong>{percent(result['accuracy'])}</strong><small>{counts}</small>"


def costs(entries: Sequence[Entry], found: Comparison) -> str:
    """Packed bytes and time of each run that has them; ● marks the front."""

    def cell(name: str, run: int, form: str) -> str:
        value = found.values[name][run]
        if value is None:
            return NOTHING
        return f"{'● ' * found.fronts[name][run]}{value:{form}}"

    rows = []
    for run, entry in enumerate(entries):
        accuracy = found.accuracies[run]
        if accuracy is None or found.chart_data(run) is None:
            continue
        latency = entry.costs.latencies.get(found.machine)
        note = f"<small>{escape(latency.note)}</small>" if latency else ""
        rows.append(
            [
                _run(run, entry),
                percent(accuracy),
                cell("packed_bytes", run, ",.0f"),
                cell("milliseconds", run, ".3f") + note,
            ]
        )
    head = ["Run", "Accuracy", "Packed bytes<small>● on the front</small>", "Ms per image<small>● on the front</small>"]
    return table(head, rows, "numbers")


def epochs(entries: Sequence[Entry]) -> str:
    """The best epochs of each run, by validation and, apart, by test accuracy."""
    rows = []
    for i, entry in enumerate(entries):
        of_validation, of_test = entry.best("val_accuracy"), entry.best("test_accuracy")
        rows.append(
            [
                _run(i, entry),
                f"{len(entry.rows)} of {_count(entry.config.get('epochs'))}",
                _epoch(of_validation, "validation"),
                _epoch(of_test, "test"),
            ]
        )
    head = [
        "Run",
        "Epochs",
        "★ Best validation epoch<small>chooses the weights</small>",
        "◇ Best test epoch<small>for reference: chooses nothing</small>",
    ]
    return table(head, rows, "numbers")


def _epoch(best: dict[str, float] | None, kind: str) -> str:
    if best is None:
        return NOTHING
    return f"{best['epoch']:g}<small>{kind} accuracy {percent(best['value'])}</small>"


def significance(entries: Sequence[Entry]) -> str:
    """McNemar's test for every pair of evaluated runs, or of many with the first one on the same data."""
    evaluated = [entry for entry in entries if entry.evaluation]
    if len(evaluated) < 2:
        return '<p class="empty">McNemar&rsquo;s test needs two evaluated runs.</p>'
    every_pair = len(evaluated) <= EVERY_PAIR_UP_TO
    pairs = (
        [(a, b, test_between(a, b)) for a, b in itertools.combinations(evaluated, 2)]
        if every_pair
        else _with_the_first(evaluated)
    )
    head = ["Runs", "Both right", "Only first", "Only second", "Neither", "p-value", "Reading at 5 %"]
    rows = [
        [f"{name(a.label)}<small>against {name(b.label)}</small>", *_test_cells(a, b, test)] for a, b, test in pairs
    ]
    several = f" The {len(pairs)} p-values are not corrected for their number." if len(pairs) > 1 else ""
    left_out = (
        ""
        if every_pair
        else (
            f" Of more than {EVERY_PAIR_UP_TO} runs each is held against the first one on the same data; <code>lowbit "
            "compare</code> with two run folders tests any other pair."
        )
    )
    return (table(head, rows, "numbers last-text") if rows else "") + (
        '<p class="fine">How many test images each run classifies correctly. The p-value is two-sided: the chance of '
        f"a difference at least this large if both runs were equally often right.{several}{left_out} McNemar 1947; "
        "Edwards 1948.</p>"
    )


def _with_the_first(entries: Sequence[Entry]) -> list[tuple[Entry, Entry, McNemar | str]]:
    """Each run with the first run above it that it can be tested against; runs without one are left out."""
    firsts: list[Entry] = []
    pairs: list[tuple[Entry, Entry, McNemar | str]] = []
    for entry in entries:
        tests = ((first, entry, test_between(first, entry)) for first in firsts)
        pair = next((found for found in tests if isinstance(found[2], McNemar)), None)
        if pair is None:
            firsts.append(entry)
        else:
            pairs.append(pair)
    return pairs


def _test_cells(first: Entry, second: Entry, test: McNemar | str) -> list[str]:
    if isinstance(test, str):
        return [*[NOTHING] * 5, f"No test: {escape(test)}."]
    counts = (test.both, test.only_first, test.only_second, test.neither)
    p_value = "&lt; 0.0001" if test.p_value < 1e-4 else f"{test.p_value:.4f}"
    how = "exact binomial" if test.exact else "chi-square, corrected"
    better = first if test.only_first > test.only_second else second
    reading = f"{name(better.label)} is better." if test.p_value < 0.05 else "The difference may be chance."
    return [*(f"{count:,}" for count in counts), f"{p_value}<small>{how}</small>", reading]


def diagnostics(entries: Sequence[Entry]) -> str:
    """What the layers of each diagnosed run are like after its last epoch, and how that was measured, folded away."""
    return "".join(
        f"<details><summary>{name(entry.label)} after epoch {found.epochs[-1]}, in numbers</summary>"
        + table(
            ["Layer", "Flips", "Flips in a step", "Gradient cosine", "Saturated", "Dead"], _figures(found), "numbers"
        )
        + f'<p class="fine">Measured on {found.images:,} train images, with {found.directions} directions of width '
        f"{found.width:g} for each.</p></details>"
        for entry in entries
        if (found := entry.diagnostics)
    )


def _figures(found: Diagnostics) -> list[list[str]]:
    rows = []
    for i, layer in enumerate(found.layers):
        flips, in_a_step, cosine, saturated, dead = (found.figures[key][i][-1] for key in QUANTITIES)
        rows.append(
            [
                name(layer),
                *(NOTHING if share is None else f"{100 * share:.3g} %" for share in (flips, in_a_step)),
                NOTHING if cosine is None else f"{cosine:.2f}",
                *(NOTHING if share is None else f"{100 * share:.1f} %" for share in (saturated, dead)),
            ]
        )
    return rows


def differences(entries: Sequence[Entry]) -> str:
    """The settings that differ, and, folded away, those that do not."""
    if len(entries) == 1:
        return _settings_table(entries, settings(entries))
    everything = settings(entries)
    differ = {key: values for key, values in everything.items() if len(set(values)) > 1}
    same = {key: values[:1] for key, values in everything.items() if key not in differ}
    shown = _settings_table(entries, differ) if differ else '<p class="empty">All settings are the same.</p>'
    folded = table(["Setting", "All runs"], _settings_rows(same), "settings") if same else ""
    return shown + (f"<details><summary>{len(same)} settings are the same</summary>{folded}</details>" if same else "")


def _settings_table(entries: Sequence[Entry], values: dict[str, list[str | None]]) -> str:
    head = ["Setting", *(_run(i, entry) for i, entry in enumerate(entries))]
    return table(head, _settings_rows(values), "settings")


def _settings_rows(values: dict[str, list[str | None]]) -> list[list[str]]:
    return [[_breakable(name(key)), *(NOTHING if v is None else name(v) for v in row)] for key, row in values.items()]


def _breakable(key: str) -> str:
    """Let a dotted name break after its dots and underscores."""
    return key.replace(".", ".<wbr>").replace("_", "_<wbr>")


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _what(entry: Entry) -> str:
    """Model, method and data of a run, as far as its config says them."""
    parts = [entry.config.get(part) for part in ("model", "method", "data")]
    names = [str(part["name"]) for part in parts if isinstance(part, dict) and "name" in part]
    if (source := (entry.evaluation or {}).get("source")) in ("weights", "packed"):
        names.append(f"evaluated from a {source} file")
    return escape(" · ".join(names))


def _profile(entry: Entry) -> dict[str, Any]:
    profile = (entry.evaluation or {}).get("profile")
    return profile if isinstance(profile, dict) else {}


def _cost(entry: Entry, key: str) -> float | None:
    return finite(_profile(entry).get(key))


def _macs(entry: Entry) -> dict[str, float]:
    macs = _profile(entry).get("macs")
    return {kind: n for kind, n in macs.items() if finite(n) is not None} if isinstance(macs, dict) else {}


def _bits(kind: str) -> str:
    return escape(kind).replace("x", " &times; ")


def _count(value: Any) -> str:
    number = finite(value)
    return NOTHING if number is None else f"{number:,.0f}"


def _ratio(larger: float | None, smaller: float | None) -> float | None:
    return larger / smaller if larger and smaller else None

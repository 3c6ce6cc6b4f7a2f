"""Runs, comparisons and differences as terminal text: tables that fit 80 columns, sparklines, plain when piped."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ntkwatch.words import layers_at, printable, sparkline, summary_lines

if TYPE_CHECKING:
    import pandas as pd

    from ntkwatch.compare import Comparison, Difference, FiniteWidth
    from ntkwatch.record import Run

PIPED_WIDTH = 200  # wide enough that no table is folded where nobody sees columns
MOST_LAYERS, MOST_RUNS = 12, 40
READABLE = 79  # columns of running text
SHORT = {
    "kernel_angle": "angle",
    "relative_change": "change",
    "kernel_distance": "distance",
    "taylor_ratio": "Taylor",
    "parameter_distance": "‖Δθ‖/‖θ₀‖",
}


def console(stderr: bool = False) -> Console:
    """A console without colour or a narrow width where the output is piped."""
    plain = Console(stderr=stderr, highlight=False, soft_wrap=False, emoji=False, markup=False)
    if plain.is_terminal or "COLUMNS" in os.environ:
        return plain
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False, width=PIPED_WIDTH, no_color=True)


def wrapped(lines: Sequence[str], width: int) -> list[str]:
    """Lines of a label and a sentence, the sentence folded beside its label; rows of a table as they are."""
    folded: list[str] = []
    for line in "\n".join(lines).splitlines():
        label = re.match(r"[A-Za-z]+:? {1,10}(?=\S)", line)
        indent = " " * (len(label[0]) if label and "  " not in line[len(label[0]) :] else 0)
        folded += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False) or [""]
    return folded


def number(value: Any, digits: int = 4) -> str:
    """A number with four significant digits; – where undefined.

    >>> number(0.123456), number(None), number(12.0), number(-0.5)
    ('0.1235', '–', '12', '−0.5')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def show(run: Run, width: int) -> RenderableType:
    """Everything that `ntkwatch show` prints of a run."""
    parts: list[RenderableType] = [_title(str(run.folder)), summary(run, width)]
    if run.steps:
        parts.append(metrics_table(run.metrics))
        layers = layers_at(run.layer_metrics, run.steps[-1])
        parts += [layer_table(layers, run.steps[-1])] if layers else []
        parts += reasons_list(run.reasons, width)
    return _spaced(parts)


def live(run: Run, width: int) -> RenderableType:
    """What moves comes first, where a short terminal cuts the rest off."""
    table = [metrics_table(run.metrics)] if run.steps else []
    return _spaced([_title(str(run.folder)), *table, summary(run, width)])


def metrics_table(metrics: pd.DataFrame) -> Table:
    """A row per metric: first, some and last values, and its course as a sparkline."""
    steps = [int(s) for s in metrics.index]
    some = sorted({steps[round(share * (len(steps) - 1))] for share in (0, 1 / 3, 2 / 3, 1)})
    table = _table("metric", *(f"step {step:,}" for step in some), course=f"{len(steps)} probes")
    for name in metrics.columns:
        values = [number(metrics[name][step]) for step in some]
        table.add_row(printable(str(name)), *values, sparkline(metrics[name]))
    return table


def layer_table(layers: dict[str, dict[str, float]], step: int) -> Table:
    """A row per module: its share of the trace, how far its kernel turned, and what else was measured."""
    names = list(dict.fromkeys(name for values in layers.values() for name in values))
    table = _table(f"layer at step {step:,}", *(name.replace("_", " ") for name in names))
    order = sorted(layers, key=lambda module: -layers[module].get("share", 0.0))
    for module in order[:MOST_LAYERS]:
        table.add_row(printable(module), *(number(layers[module].get(name)) for name in names))
    if len(order) > MOST_LAYERS:
        table.add_row(f"… {len(order) - MOST_LAYERS} more: --json", *[""] * len(names))
    return table


def summary(run: Run, width: int) -> Table:
    """The run in words, an axis a row."""
    return pairs(summary_lines(run), "bold", min(width, READABLE))


def reasons_list(reasons: dict[int, dict[str, str]], width: int) -> list[RenderableType]:
    """Undefined values, by metric and cause, with the steps they are undefined at."""
    causes: dict[tuple[str, str], list[int]] = {}
    for step, by_name in reasons.items():
        for name, why in by_name.items():
            causes.setdefault((name, why), []).append(step)
    lines = [printable(f"{name} at {_steps(steps)}: {why}") for (name, why), steps in causes.items()]
    labelled = [("" if i else "Undefined", line) for i, line in enumerate(lines)]
    return [pairs(labelled, "bold", min(width, READABLE))] if lines else []


def comparison(c: Comparison) -> RenderableType:
    """The runs, the slopes with their intervals and readings, and the notes."""
    parts: list[RenderableType] = []
    if c.mismatch:
        parts.append(Text(f"Mismatch allowed: {c.mismatch}", style="bold red"))
    optimizers = ", ".join(sorted(set(c.table["optimizer"])))
    parts.append(_title(f"{len(c.table)} runs ({optimizers}) at step {c.step:,}, the last they share"))
    parts += [runs_table(c), slopes_table(c), *_readings(c)]
    parts += _finite_width(c.finite_width) if c.finite_width is not None else []
    parts += [pairs([("Note", f"{note}.") for note in c.notes], "yellow", READABLE)] if c.notes else []
    return _spaced(parts)


def _finite_width(w: FiniteWidth) -> list[RenderableType]:
    """The first kernels beside their infinite-width limit: a row per width, slopes, and how wide is wide."""
    table = _table("K₀ at width n", "runs", "distance to K∞", "over seeds", "n·bias", "±", "n·variance")
    for row in w.table.to_dict("records"):
        values = [row[name] for name in ("distance", "deviation", "n_bias", "n_bias_error", "n_variance")]
        table.add_row(f"{row['width']:g}", str(int(row["runs"])), *(number(v, 3) for v in values))
    said = [f"{name}: slope {slope},\n  {w.reading(name)}." for name, slope in w.slopes.items()]
    if w.wide is not None:
        said.append(f"K₀ is within 10 % of its limit, in the root mean square, from width {number(w.wide, 3)} on.")
    notes = pairs([("Note", f"{note}.") for note in w.notes], "yellow", READABLE)
    return [table, Text("\n".join(said)), notes]


def _readings(c: Comparison) -> list[RenderableType]:
    """What the slopes say; names of one reading together."""
    said: dict[str, list[str]] = {}
    for name in c.slopes:
        said.setdefault(c.reading(name), []).append(name)
    return [Text("\n".join(f"{', '.join(names)}:\n  {reading}." for reading, names in said.items()))] if said else []


def runs_table(c: Comparison) -> Table:
    """A row per run at the last common step."""
    from ntkwatch.compare import SLOPES

    names = [name for name in SLOPES if name in c.table]
    table = _table("run", c.x, "seed", *(SHORT[name] for name in names))
    for row in c.table.head(MOST_RUNS).to_dict("records"):
        seed = "–" if _missing(row["seed"]) else str(row["seed"])
        table.add_row(row["run"], f"{row[c.x]:g}", seed, *(number(row[name], 3) for name in names))
    if len(c.table) > MOST_RUNS:
        table.add_row(f"… {len(c.table) - MOST_RUNS} more", *[""] * (len(names) + 2))
    return table


def slopes_table(c: Comparison) -> Table:
    """A row per slope of log metric on log x."""
    table = _table(f"slope against {c.x}", "slope", "95 % low", "high", "R²", "points", "dof")
    for name, s in c.slopes.items():
        values = (f"{v:+.3f}".replace("-", "−") if math.isfinite(v) else "–" for v in (s.value, s.low, s.high))
        table.add_row(name, *values, number(s.r2, 3), str(s.n), str(s.dof))
    return table


def difference(d: Difference) -> RenderableType:
    """Kernel similarity by step and by layer."""
    a, b = d.names
    steps = _table("step", "angle (rad)", "CKA", "log scale B/A")
    for row in d.table.to_dict("records"):
        steps.add_row(f"{row['step']:,}", *(number(row[name]) for name in ("angle", "cka", "scale")))
    layers = _table(f"layer at step {d.step:,}", "share A", "share B", "angle (rad)", "CKA", "log scale")
    for row in d.layers.to_dict("records"):
        layers.add_row(printable(row.pop("layer")), *(number(v) for v in row.values()))
    parts: list[RenderableType] = [Text(f"A  {a}\nB  {b}", style="bold"), steps]
    parts += [layers] if len(d.layers) else []
    parts += [Text(printable(f"In one only: {', '.join(d.only)}"))] if d.only else []
    return _spaced(parts)


def pairs(rows: Sequence[tuple[str, str]], style: str = "cyan", width: int | None = None) -> Table:
    """Names and what they are, in two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.width = width
    table.add_column(min_width=9)
    table.add_column(ratio=1 if width else None)
    for name, text in rows:
        table.add_row(Text(name, style=style), Text(text))
    return table


def _table(first: str, *columns: str, course: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column(printable(first), overflow="fold")
    for column in columns:
        table.add_column(printable(column), justify="right", overflow="fold")
    if course is not None:
        table.add_column(course, no_wrap=True, style="cyan")
    return table


def _spaced(parts: Sequence[RenderableType]) -> Group:
    """Parts with an empty line between them."""
    return Group(*(piece for i, part in enumerate(parts) for piece in ([Text(""), part] if i else [part])))


def _title(text: str) -> Text:
    return Text(printable(text), style="bold cyan")


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"{len(steps)} steps, {steps[0]:,} to {steps[-1]:,}"


def _missing(value: Any) -> bool:
    return value is None or value != value or str(value) == "<NA>"

"""Runs, comparisons and differences as terminal text: tables that fit 80 columns, sparklines, plain when piped."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ntkwatch.cli.tables import COLUMN_GAP, MIN_COLUMN_WIDTH, Column, pairs, shorten_middle, stacked, table
from ntkwatch.summary import layers_at, never_defined, printable, sparkline, summary_lines, undefined

if TYPE_CHECKING:
    import pandas as pd

    from ntkwatch.compare import Comparison, Difference, FiniteWidth
    from ntkwatch.record import Run

PIPED_WIDTH = 200  # wide enough that no table is folded where nobody sees columns
MOST_LAYERS, MOST_RUNS = 12, 40
FEWEST_IN_SECTIONS = 30  # rows of a table that is shown in sections
OTHER = "other"
COURSE = (16, 8)  # columns of a sparkline, and the fewest
READABLE = 79  # columns of running text
LISTED = 120  # columns of a name and a sentence
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
    rows: list[str] = []
    for line in "\n".join(lines).splitlines():
        label = re.match(r"[A-Za-z]+:? {1,10}(?=\S)", line)
        indent = " " * (len(label[0]) if label and "  " not in line[len(label[0]) :] else 0)
        fits = len(line) <= width  # a row of a table, as it is
        rows += [line] if fits else textwrap.wrap(line, width, subsequent_indent=indent)
    return rows


def folded(message: str) -> list[str]:
    """A message in lines that fit the terminal of stderr; one line where nobody sees columns."""
    stderr = console(stderr=True)
    return textwrap.wrap(message, stderr.width) if stderr.is_terminal or "COLUMNS" in os.environ else [message]


def documentation(text: str, width: int) -> list[str]:
    """A docstring of labelled lines folded at words; what goes on a line above is set in."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("    ") and lines and lines[-1]:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.rstrip())
    return [row for line in lines for row in textwrap.wrap(line, width, subsequent_indent="    ") or [""]]


def format_number(value: Any, digits: int = 4) -> str:
    """A number with four significant digits; – where undefined.

    >>> format_number(0.123456), format_number(None), format_number(12.0), format_number(-0.5)
    ('0.1235', '–', '12', '−0.5')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}".replace("-", "−")


def show(run: Run, width: int) -> RenderableType:
    """Everything that `ntkwatch show` prints of a run."""
    parts: list[RenderableType] = [_title(str(run.folder)), *_beside(run), summary(run, width, without=("Undefined",))]
    if run.steps:
        parts.append(metrics_table(run.metrics, width))
        layers = layers_at(run.layer_metrics, run.steps[-1])
        parts += layer_tables(layers, run.steps[-1], width) if layers else []
        parts += reasons_list(run, width)
    return _spaced(parts)


def _beside(run: Run) -> list[RenderableType]:
    """Where the log holds more than this record."""
    if not run.others:
        return []
    earlier = printable(", ".join(map(str, run.others)))
    return [Text(f"The newest of {len(run.others) + 1} records of this log; earlier: {earlier}")]


def live(run: Run, width: int) -> RenderableType:
    """What moves comes first, where a short terminal cuts the rest off."""
    moving = [metrics_table(run.metrics, width)] if run.steps else []
    return _spaced([_title(str(run.folder)), *moving, summary(run, width)])


def metrics_table(metrics: pd.DataFrame, width: int) -> Table:
    """A row per metric that is ever defined: as many steps as fit, the last first of all, and its course."""
    rows = _in_sections([str(name) for name in metrics.columns if name not in never_defined(metrics)])
    names = [name for _, name in rows]
    steps, bars = _fitting(metrics, names, width)
    values = [_at(metrics, names, step) for step in steps]
    room = max(MIN_COLUMN_WIDTH, width - sum(each.least + COLUMN_GAP for each in values) - bars - COLUMN_GAP)
    columns = [Column("metric", [shorten_middle(printable(name), room) for name in names])]
    columns += [*values, Column(f"{len(metrics)} probes", [sparkline(metrics[name], bars) for name in names])]
    starts = [(i, title) for i, (title, _) in enumerate(rows) if title and (i == 0 or rows[i - 1][0] != title)]
    return table(columns, width, starts)


def _at(metrics: pd.DataFrame, names: Sequence[str], step: int) -> Column:
    return Column(f"step {step:,}", [format_number(metrics[name][step]) for name in names])


def _fitting(metrics: pd.DataFrame, names: Sequence[str], width: int) -> tuple[list[int], int]:
    """The steps whose values are shown, four at most and the last at least, and the length of a sparkline."""
    steps = [int(step) for step in metrics.index]
    for count in (4, 3, 2, 1):
        some = sorted({steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)})
        some = some if count > 1 else steps[-1:]
        taken = sum(len(f"step {step:,}") + COLUMN_GAP for step in some) + max(map(len, names), default=0) + COLUMN_GAP
        taken += sum(max(0, _at(metrics, names, step).least - len(f"step {step:,}")) for step in some)
        for bars in COURSE if count == 1 else COURSE[:1]:
            if taken + bars <= width:
                return some, bars
    return steps[-1:], COURSE[-1]


def _in_sections(names: Sequence[str]) -> list[tuple[str, str]]:
    """(section, name), by section where there are many."""
    if len(names) < FEWEST_IN_SECTIONS:
        return [("", name) for name in names]
    from ntkwatch.diagnostics import SECTIONS

    place = {name: title for title, members in SECTIONS.items() for name in members}
    order = [*SECTIONS, OTHER]
    return sorted(((place.get(name, OTHER), name) for name in names), key=lambda row: order.index(row[0]))


def layer_tables(layers: dict[str, dict[str, float]], step: int, width: int) -> list[Table]:
    """A row per module: its share of the trace, how far its kernel turned, and what else was measured."""
    names = list(dict.fromkeys(name for values in layers.values() for name in values))
    order = sorted(layers, key=lambda module: -layers[module].get("share", 0.0))
    more = [f"… {len(order) - MOST_LAYERS} more: --json"] if len(order) > MOST_LAYERS else []
    shown, blank = order[:MOST_LAYERS], [""] * len(more)
    columns = [
        Column(name.replace("_", " "), [*(format_number(layers[module].get(name)) for module in shown), *blank])
        for name in names
    ]
    return stacked(f"layer at step {step:,}", [*map(printable, shown), *more], columns, width)


def summary(run: Run, width: int, without: Sequence[str] = ()) -> Table:
    """The run in words, an axis a row."""
    lines = [line for line in summary_lines(run) if line[0] not in without]
    return pairs(lines, "bold", min(width, READABLE))


def reasons_list(run: Run, width: int) -> list[RenderableType]:
    """Undefined values, by cause: those that are never defined, and the others with the steps they are undefined at."""
    never, partly = undefined(run.metrics, run.reasons)
    labelled = [("" if i else label, printable(line)) for label, lines in (("Undefined", never), ("In part", partly))
                for i, line in enumerate(lines)]  # fmt: skip
    return [pairs(labelled, "bold", min(width, READABLE))] if labelled else []


def comparison(c: Comparison, width: int) -> RenderableType:
    """The runs, the slopes with their intervals and readings, and the notes."""
    parts: list[RenderableType] = []
    if c.mismatch:
        parts.append(Text(f"Mismatch allowed: {c.mismatch}", style="bold red"))
    optimizers = ", ".join(sorted(set(c.table["optimizer"])))
    parts.append(_title(f"{len(c.table)} runs ({optimizers}) at step {c.step:,}, the last they share"))
    parts += [*runs_tables(c, width), *slopes_tables(c, width), *_readings(c, width)]
    parts += _finite_width(c.finite_width, width) if c.finite_width is not None else []
    parts += _notes(c.notes, width)
    return _spaced(parts)


def _finite_width(w: FiniteWidth, width: int) -> list[RenderableType]:
    """The first kernels beside their infinite-width limit: a row per width, slopes, and how wide is wide."""
    rows = w.table.to_dict("records")
    shown = {"distance to K∞": "distance", "over seeds": "deviation", "n·bias": "n_bias", "±": "n_bias_error"}
    shown |= {"n·variance": "n_variance"}
    columns = [Column("runs", [str(int(row["runs"])) for row in rows])]
    columns += [Column(heading, [format_number(row[name], 3) for row in rows]) for heading, name in shown.items()]
    said = [f"{name}: slope {slope}, {w.reading(name)}.".replace("-", "−") for name, slope in w.slopes.items()]
    if w.why_not_wide is not None:
        said.append(f"The width from which K₀ is within 10 % of its limit is {w.why_not_wide}.")
    if w.wide is not None:
        said.append(
            f"K₀ is within 10 % of its limit, in the root mean square, from width {format_number(w.wide, 3)} on."
        )
    tables = stacked("K₀ at width n", [f"{row['width']:g}" for row in rows], columns, width)
    return [*tables, Text("\n".join(_hanging(said, width))), *_notes(w.notes, width)]


def _notes(notes: Sequence[str], width: int) -> list[RenderableType]:
    labelled = [("" if i else "Note", f"{note}.") for i, note in enumerate(notes)]
    return [pairs(labelled, "yellow", min(width, READABLE))] if labelled else []


def _readings(c: Comparison, width: int) -> list[RenderableType]:
    """What the slopes say; names of one reading together."""
    said: dict[str, list[str]] = {}
    for name in c.slopes:
        said.setdefault(c.reading(name), []).append(name)
    lines = [f"{', '.join(names)}: {reading}." for reading, names in said.items()]
    return [Text("\n".join(_hanging(lines, width)))] if said else []


def runs_tables(c: Comparison, width: int) -> list[Table]:
    """A row per run at the last common step."""
    from ntkwatch.compare import SLOPES

    names = [name for name in SLOPES if name in c.table]
    rows = c.table.head(MOST_RUNS).to_dict("records")
    more = [f"… {len(c.table) - MOST_RUNS} more"] if len(c.table) > MOST_RUNS else []
    blank = [""] * len(more)
    columns = [Column(c.x, [*(f"{row[c.x]:g}" for row in rows), *blank])]
    columns.append(Column("seed", [*("–" if _missing(row["seed"]) else str(row["seed"]) for row in rows), *blank]))
    columns += [Column(SHORT[name], [*(format_number(row[name], 3) for row in rows), *blank]) for name in names]
    return stacked("run", [*(row["run"] for row in rows), *more], columns, width)


def slopes_tables(c: Comparison, width: int) -> list[Table]:
    """A row per slope of log metric on log x."""
    slopes = list(c.slopes.values())
    signed = {"slope": "value", "95 % low": "low", "high": "high"}
    columns = [Column(heading, [_signed(getattr(s, name)) for s in slopes]) for heading, name in signed.items()]
    columns += [Column("R²", [format_number(s.r2, 3) for s in slopes]), Column("points", [str(s.n) for s in slopes])]
    columns.append(Column("dof", [str(s.dof) for s in slopes]))
    return stacked(f"slope against {c.x}", list(c.slopes), columns, width)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if math.isfinite(value) else "–"


def difference(d: Difference, width: int) -> RenderableType:
    """Kernel similarity by step and by layer."""
    a, b = d.names
    rows, layers = d.table.to_dict("records"), d.layers.to_dict("records")
    shown = {"angle (rad)": "angle", "CKA": "cka", "log scale B/A": "scale"}
    columns = [Column(heading, [format_number(row[name]) for row in rows]) for heading, name in shown.items()]
    parts: list[RenderableType] = [Text(f"A  {a}\nB  {b}", style="bold")]
    parts += stacked("step", [f"{row['step']:,}" for row in rows], columns, width)
    if layers:
        names = [printable(row.pop("layer")) for row in layers]
        headings = ("share A", "share B", "angle (rad)", "CKA", "log scale")
        values = zip(headings, zip(*(row.values() for row in layers), strict=True), strict=True)
        columns = [Column(heading, [format_number(v) for v in cells]) for heading, cells in values]
        parts += stacked(f"layer at step {d.step:,}", names, columns, width)
    parts += [Text(printable(f"In one only: {', '.join(d.only)}"))] if d.only else []
    return _spaced(parts)


def _hanging(lines: Sequence[str], width: int) -> list[str]:
    """Sentences folded at words, a sentence's later lines set in."""
    return [row for line in lines for row in textwrap.wrap(line, min(width, READABLE), subsequent_indent="  ")]


def _spaced(parts: Sequence[RenderableType]) -> Group:
    """Parts with an empty line between them."""
    return Group(*(piece for i, part in enumerate(parts) for piece in ([Text(""), part] if i else [part])))


def _title(text: str) -> Text:
    return Text(printable(text), style="bold cyan")


def _missing(value: Any) -> bool:
    return value is None or value != value or str(value) == "<NA>"

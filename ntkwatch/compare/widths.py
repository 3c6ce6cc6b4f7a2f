"""Runs → one tidy table over width (or any hyperparameter), and log–log slopes with confidence intervals.

Only kernels of one kind can be compared: unlike probes, reduction, mode or diagnostics are refused, with the reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkwatch import figures
from ntkwatch.compare.finite_width import LAW, FiniteWidth, finite_width
from ntkwatch.compare.runs import (
    CompareError,
    MismatchError,
    abbreviated,
    differences,
    json_rows,
    json_value,
    last_common_step,
    names_of,
    seed_of,
    x_of,
)
from ntkwatch.compare.slopes import LEVEL, Slope, bent, fit_slope, read_slope, reference_lines
from ntkwatch.record import RecordError, Run, find_runs, load_run
from ntkwatch.summary import optimizer_name, printable, switched_off

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SLOPES = ("kernel_angle", "relative_change", "kernel_distance", "taylor_ratio", "parameter_distance")
COURSES = ("kernel_angle", "taylor_ratio")


@dataclass(frozen=True)
class Comparison:
    """Several runs at their last common step.

    `table`: a row per run (run, x, seed, step, optimizer, every metric); `history`: the metrics at every step, a row
    per run, step and metric; `notes`: what was left out and what to bear in mind; `mismatch`: what was overridden.
    """

    x: str
    step: int
    table: pd.DataFrame
    history: pd.DataFrame
    slopes: dict[str, Slope]
    notes: tuple[str, ...]
    mismatch: str | None
    runs: tuple[Run, ...]

    @cached_property
    def seed_spread(self) -> pd.DataFrame:
        """Relative deviation of K at the first step over the seeds of each x (theory: ∝ width^−½), a row per x."""
        return _seed_spread(self.runs, self.table[self.x])

    @cached_property
    def finite_width(self) -> FiniteWidth | None:
        """K_0 against its infinite-width limit; None for another x, and where no run kept a limit."""
        return finite_width(self.runs, list(self.table[self.x])) if self.x == "width" else None

    def reading(self, name: str) -> str:
        """Which reference line the slope of `name` is nearer, and whether its interval holds that line."""
        return read_slope(name, self.slopes[name]) if self.x == "width" else "no reference line for this x"

    def figures(self) -> dict[str, Figure]:
        """One log–log figure for each slope, and the course of COURSES in every run; an override is printed."""
        note = f"mismatch allowed: {self.mismatch}".replace("$", r"\$") if self.mismatch else None
        about: dict[str, Any] = {"x": self.x, "note": note}
        drawn = {
            f"slope_{name}": figures.width_slopes(
                self.table,
                self.slopes,
                name,
                references=reference_lines(name) if self.x == "width" else {},
                **about,
            )
            for name in self.slopes
        }
        measured = [name for name in COURSES if name in self.table]
        if (wide := self.finite_width) is not None:
            drawn |= {
                f"slope_{name}": figures.width_slopes(wide.points, wide.slopes, name, references={LAW: "−½"}, **about)
                for name in wide.slopes
            }
        return drawn | {f"course_{name}": figures.metric_curves(self.history, name, **about) for name in measured}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the history as JSON types; an undefined number is None."""
        return {
            "x": self.x,
            "step": self.step,
            "runs": json_rows(self.table),
            "slopes": {name: self._slope_as_dict(name) for name in self.slopes},
            "seed_spread": json_rows(self.seed_spread),
            "finite_width": self.finite_width.as_dict() if self.finite_width is not None else None,
            "mismatch": self.mismatch,
            "notes": list(self.notes),
        }

    def _slope_as_dict(self, name: str) -> dict[str, Any]:
        numbers = {key: json_value(value) for key, value in self.slopes[name]._asdict().items()}
        return numbers | {"level": LEVEL, "dof": self.slopes[name].dof, "reading": self.reading(name)}


def compare_runs(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    x: str = "width",
    *,
    allow_mismatch: bool = False,
    min_width: float | None = None,
) -> Comparison:
    """Compare records (or folders that hold records) over `x`, a hyperparameter, at the last step they all share.

    `min_width` drops runs with a smaller x: small widths bend the line. Raises MismatchError where the kernels are
    not one quantity (unless `allow_mismatch`), CompareError where x is missing, not a number, or nothing is shared,
    and RecordError for a folder without a record.
    """
    placed = [(x_of(run, x), run) for run in _load(paths)]
    kept = [(value, run) for value, run in placed if min_width is None or value >= min_width]
    if not kept:
        raise CompareError(
            f"no run has {x} ≥ {min_width:g} (the largest is {max(value for value, _ in placed):g}): lower --min-width"
        )
    kept.sort(key=lambda pair: (pair[0], seed_of(pair[1]) or 0))
    xs, runs = [value for value, _ in kept], [run for _, run in kept]
    if len(set(xs)) < 2:
        raise CompareError(
            f"{_runs(len(runs))} with one {x} ({xs[0]:g}): a comparison needs at least two; give more runs, or name "
            "another hyperparameter with --x"
        )
    mismatch = "; ".join(differences(runs)) or None
    if mismatch and not allow_mismatch:
        raise MismatchError(f"these runs do not measure the same kernel: {mismatch} (--allow-mismatch compares anyway)")
    step = last_common_step(runs)
    table = _table(runs, xs, x, step)
    slopes, notes = _slopes(table, x, runs)
    notes += _cautions(table, x, step) + _ended(runs)
    if x == "width" and any(bent(name, slope) for name, slope in slopes.items()):
        notes.append(
            f"small widths bend a slope away from its line: try --min-width {sorted(set(xs))[1]:g} and wider runs"
        )
    return Comparison(x, step, table, _history(runs, xs, x), slopes, tuple(notes), mismatch, tuple(runs))


def _load(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Run]:
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    folders = {folder.resolve(): folder for folder in find_runs([Path(path) for path in given])}
    runs = [load_run(folder) for folder in folders.values()]
    empty = [str(run.folder) for run in runs if not run.steps]
    if empty:
        raise CompareError(f"{abbreviated(empty)} holds no probe yet: wait for its first, or leave it out")
    return runs


def _table(runs: Sequence[Run], xs: Sequence[float], x: str, step: int) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "run": name,
            x: value,
            "seed": seed_of(run),
            "step": step,
            "optimizer": optimizer_name(run.manifest) or "unknown",
        }
        | {k: v for k, v in run.metrics.loc[step].items() if k not in (x, "seed", "step")}
        for run, value, name in zip(runs, xs, names_of(runs), strict=True)
    ]
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def _history(runs: Sequence[Run], xs: Sequence[float], x: str) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for run, value, name in zip(runs, xs, names_of(runs), strict=True):
        long = run.metrics.rename_axis("step").reset_index().melt("step", var_name="metric", value_name="value")
        parts.append(long.assign(run=name, **{x: value}, seed=seed_of(run)))
    return pd.concat(parts, ignore_index=True)[["run", x, "seed", "step", "metric", "value"]]


def _slopes(table: pd.DataFrame, x: str, runs: Sequence[Run]) -> tuple[dict[str, Slope], list[str]]:
    slopes, notes = {}, []
    for name in SLOPES:
        if name not in table:
            notes.append(f"{name} has no slope: no run measured it")
        elif not ((values := table[name]) > 0).all():
            bad = int((~(values > 0)).to_numpy().argmax())
            why = (runs[bad].reasons.get(int(table["step"][bad])) or {}).get(name) or f"it is {values[bad]:g} there"
            notes.append(f"{name} has no slope, which needs positive values: {table['run'][bad]}: {why}")
        else:
            slopes[name] = fit_slope(list(table[x]), list(values))
    return slopes, notes


def _cautions(table: pd.DataFrame, x: str, step: int) -> list[str]:
    notes = []
    if step == 0:
        notes.append("the last common step is 0, before training: nothing can have moved")
    if len(table) < 3:
        notes.append(f"no confidence interval from {len(table)} points: it needs three or more")
    few = table.groupby(x).size()
    if (few < 3).any():
        notes.append(
            f"{x} {few.idxmin():g} has {_runs(int(few.min()))}: the interval asks for three seeds or more at each"
        )
    other = sorted(set(table["optimizer"]) - {"SGD"})
    if x == "width" and other:
        notes.append(f"the reference lines hold for SGD; the optimizer here: {', '.join(other)}")
    if len(set(table["optimizer"])) > 1:
        notes.append("the runs differ in their optimizer")
    return notes


def _ended(runs: Sequence[Run]) -> list[str]:
    """Which runs' watches were switched off: the last step in common may be far from the end. One reason, told once."""
    by_reason: dict[str, list[str]] = {}
    for run, name in zip(runs, names_of(runs), strict=True):
        if why := switched_off(run.manifest):
            by_reason.setdefault(printable(why), []).append(name)
    return [f"{abbreviated(names)}: {why[0].lower()}{why[1:]}" for why, names in by_reason.items()]


def _seed_spread(runs: Sequence[Run], xs: Iterable[float]) -> pd.DataFrame:
    import pandas as pd

    groups: dict[float, list[Run]] = {}
    for run, value in zip(runs, xs, strict=True):
        groups.setdefault(value, []).append(run)
    rows = [{"x": value, "runs": len(members), "spread": _spread(members)} for value, members in groups.items()]
    return pd.DataFrame(rows)


def _spread(runs: Sequence[Run]) -> float:
    """NaN from one run, from kernels of unlike shape, and where the first kernel was not saved."""
    import torch

    try:
        kernels = [run.kernel(run.steps[0]) for run in runs]
    except RecordError:
        return math.nan
    if len(kernels) < 2 or len({k.shape for k in kernels}) > 1:
        return math.nan
    stack = torch.stack(kernels)
    deviation = (stack - stack.mean(0)).square().sum() / (len(kernels) - 1)
    return float(deviation.sqrt() / stack.mean(0).norm())


def _runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"

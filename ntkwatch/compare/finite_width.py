"""K_0 against its infinite-width limit over width: distance, spread over seeds, corrections, and how wide is wide.

K_∞ is the mean over initialisations that `infinite.from_module` predicts for each run's own width, scheme and
parametrization, so in the standard parametrization it grows with width: everything is relative to ‖K_∞‖. Theory:
‖K_0 − K_∞‖/‖K_∞‖ and the deviation over seeds fall as n^−½; n·(E K_0 − K_∞) and n·Var K_0 tend to constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkwatch.compare.runs import abbreviated, json_rows, json_value, names_of
from ntkwatch.compare.slopes import Slope, fit_slope
from ntkwatch.record import RecordError, Run

if TYPE_CHECKING:
    import pandas as pd

DISTANCE, DEVIATION = "distance_to_infinite", "seed_deviation"
LAW = -0.5
STEEPEST = -1.0  # of a distance that is all bias
NEAR = 0.1  # of ‖K_∞‖: what counts as wide
FEWEST_SEEDS = 3
BIASES = 0.3  # share of the trace above which they hide the law


@dataclass(frozen=True)
class _First:
    """One run's first trace kernel and K_∞, on the same probes [m, m]; the share of biases in the whole trace."""

    width: float
    kernel: Tensor
    limit: Tensor
    biases: float

    @property
    def error(self) -> Tensor:
        """K_0 − K_∞ over ‖K_∞‖."""
        return (self.kernel - self.limit) / self.limit.norm()


@dataclass(frozen=True)
class FiniteWidth:
    """points: a row per run (run, width, distance_to_infinite, seed_deviation). notes: what to bear in mind."""

    firsts: tuple[_First, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def points(self) -> pd.DataFrame:
        """seed_deviation: ‖K_0 − mean over seeds‖/‖K_∞‖·√(S/(S − 1)), NaN with fewer than 3 seeds."""
        import pandas as pd

        rows = []
        for first, name in zip(self.firsts, self.names, strict=True):
            errors = self._errors(first.width)
            s = len(errors)
            off = float((first.error - errors.mean(0)).norm()) * math.sqrt(s / max(s - 1, 1))
            deviation = off if s >= FEWEST_SEEDS else math.nan
            rows.append({"run": name, "width": first.width, DISTANCE: float(first.error.norm()), DEVIATION: deviation})
        return pd.DataFrame(rows, columns=["run", "width", DISTANCE, DEVIATION])

    @cached_property
    def slopes(self) -> dict[str, Slope]:
        """Of log distance and log deviation on log width, over all points; those that can be fitted."""
        found = {}
        for name in (DISTANCE, DEVIATION):
            kept = self.points[self.points[name] > 0]
            if kept["width"].nunique() > 1:
                found[name] = fit_slope(list(kept["width"]), list(kept[name]))
        return found

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per width n: runs, rms distance, rms deviation over seeds, n·bias ± its error, n·variance.

        bias: of the scale, ⟨E K_0 − K_∞, K_∞⟩/‖K_∞‖². variance: Σ Var K_0/‖K_∞‖². NaN with one seed.
        """
        import pandas as pd

        return pd.DataFrame([self._at(width) for width in sorted({f.width for f in self.firsts})])

    def _at(self, n: float) -> dict[str, float]:
        errors = self._errors(n)
        along = torch.stack([(f.error * f.limit / f.limit.norm()).sum() for f in self.firsts if f.width == n])
        several = len(errors) > 1
        variance = float(errors.var(0).sum()) if several else math.nan
        return {
            "width": n,
            "runs": len(errors),
            "distance": float(errors.square().sum((1, 2)).mean().sqrt()),
            "deviation": math.sqrt(variance) if several else math.nan,
            "n_bias": n * float(along.mean()),
            "n_bias_error": n * float(along.std()) / math.sqrt(len(errors)) if several else math.nan,
            "n_variance": n * variance,
        }

    def corrections(self, width: float) -> tuple[Tensor, Tensor]:
        """n·(E K_0 − K_∞)/‖K_∞‖ and n·Var K_0/‖K_∞‖² entry by entry, [m, m], from the runs of that width."""
        errors = self._errors(width)
        if len(errors) < 2:
            raise ValueError(f"corrections need two seeds or more at width {width:g}, got {len(errors)}: add seeds")
        return width * errors.mean(0), width * errors.var(0)

    @cached_property
    def wide(self) -> float | None:
        """The width at which the rms distance is 10 %, from variance V/n and squared bias B²/n².

        None with one seed, and where the distances fall otherwise (`why_not_wide`): no law, no extrapolation.
        """
        if self.why_not_wide is not None:
            return None
        rows = [(f.width, self._errors(f.width)) for f in self.firsts]
        known = {n: e for n, e in rows if len(e) > 1}
        if not known:
            return None
        total = sum(1 / n for n in known)
        v = sum(float(e.var(0).sum()) for e in known.values()) / total
        squares = {n: float(e.mean(0).square().sum() - e.var(0).sum() / len(e)) for n, e in known.items()}
        b2 = max(0.0, sum(n * square for n, square in squares.items()) / total)
        return (v + math.sqrt(v * v + 4 * NEAR**2 * b2)) / (2 * NEAR**2)

    @property
    def why_not_wide(self) -> str | None:
        """Why no width is extrapolated to, where the interval of the distance's slope holds nothing of [−1, −½]."""
        slope = self.slopes.get(DISTANCE)
        if slope is None or not (slope.low > LAW or slope.high < STEEPEST):
            return None
        return "undefined: the distance does not fall as between n^−1 and n^−½, which would tell it"

    def _errors(self, width: float) -> Tensor:
        """[seeds, m, m]."""
        return torch.stack([f.error for f in self.firsts if f.width == width])

    def reading(self, name: str) -> str:
        """Whether the interval of a slope holds −½."""
        slope = self.slopes[name]
        if math.isnan(slope.low):
            return f"no interval from {slope.n} points"
        holds = slope.low <= LAW <= slope.high
        return f"the interval {'holds' if holds else 'does not hold'} −½, the law of wide networks"

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        slopes = {
            name: {k: json_value(v) for k, v in slope._asdict().items()} | {"reading": self.reading(name)}
            for name, slope in self.slopes.items()
        }
        return {
            "points": json_rows(self.points),
            "table": json_rows(self.table),
            "slopes": slopes,
            "width_within_10_percent": self.wide,
            "width_within_10_percent_reason": self.why_not_wide,
            "notes": list(self.notes),
        }


def finite_width(runs: Sequence[Run], widths: Sequence[float]) -> FiniteWidth | None:
    """What the first kernels of these runs say about their limit; None where no run kept one."""
    firsts, names, missing = [], [], []
    for run, width, name in zip(runs, widths, names_of(runs), strict=True):
        try:
            firsts.append(_first(run, width))
            names.append(name)
        except RecordError as error:
            missing.append((name, str(error)))
    if not firsts:
        return None
    shapes = {f.limit.shape for f in firsts}
    if len(shapes) > 1:
        return None
    return FiniteWidth(tuple(firsts), tuple(names), tuple(_notes(firsts, missing)))


def _first(run: Run, width: float) -> _First:
    limit, layers = run.limit, run.layers(run.steps[0])
    whole = torch.stack(list(layers.values())).sum(0)
    biases = sum(float(k.trace()) for name, k in layers.items() if name.rpartition(".")[2] == "bias")
    rows = limit.rows
    return _First(width, whole[rows][:, rows], limit.kernel, biases / float(whole.trace()))


def _notes(firsts: Sequence[_First], missing: Sequence[tuple[str, str]]) -> list[str]:
    notes = [
        "K_∞ is the mean over initialisations at each run's own width, scheme and parametrization; all is over ‖K_∞‖"
    ]
    share = max(f.biases for f in firsts)
    if share > BIASES:
        notes.append(
            f"up to {share:.0%} of the trace of K_0 is of biases, whose gradients hardly fluctuate and hide the law at "
            "small widths: Kaiming's scale of the weights shows it"
        )
    seeds = min(sum(f.width == n for f in firsts) for n in {f.width for f in firsts})
    if seeds < FEWEST_SEEDS:
        notes.append(f"{seeds} seed{'s' * (seeds != 1)} at some width: deviation over seeds asks for three or more")
    if missing:
        notes.append(f"without a limit: {abbreviated([name for name, _ in missing])} ({missing[0][1]})")
    return notes

"""Several runs side by side: metrics over width with fitted slopes, or two kernels against each other.

In: folders of runs. Out: `Comparison` (table, slopes with intervals, figures) and `Difference`.
Read `runs` (what makes runs comparable), `slopes`, `widths`, `finite_width`, then `diff`.
"""

from __future__ import annotations

from ntkwatch.compare.diff import Difference, diff_runs
from ntkwatch.compare.finite_width import FiniteWidth
from ntkwatch.compare.runs import CompareError, MismatchError, json_rows, names_of
from ntkwatch.compare.slopes import Slope, fit_slope, read_slope
from ntkwatch.compare.widths import SLOPES, Comparison, compare_runs
from ntkwatch.summary import summarise

__all__ = [
    "SLOPES",
    "CompareError",
    "Comparison",
    "Difference",
    "FiniteWidth",
    "MismatchError",
    "Slope",
    "compare_runs",
    "diff_runs",
    "fit_slope",
    "json_rows",
    "names_of",
    "read_slope",
    "summarise",
]

"""One run → a summary in words: axes with numbers beside reference points, never a bare "lazy" or "rich".

In: a run's manifest and tables (`Run`, or anything of the same form). Out: sentences, by axis, and one verdict.
Read `summary` (the whole), `axes` and `recorded` (one function per axis), `reference_scale` (what numbers are compared
with), `verdict`, then `undefined` and `text`.
"""

from __future__ import annotations

from ntkwatch.summary.axes import layers_at, path, speed
from ntkwatch.summary.reference_scale import (
    REFERENCE_ANGLE,
    REFERENCE_GAMMA,
    REFERENCE_TAYLOR_RATIO,
    describe_position,
    equivalent_gamma,
)
from ntkwatch.summary.summary import optimizer_name, summarise, summary_lines, switched_off, unmoved
from ntkwatch.summary.text import printable, sparkline
from ntkwatch.summary.undefined import never_defined, undefined

__all__ = [
    "REFERENCE_ANGLE",
    "REFERENCE_GAMMA",
    "REFERENCE_TAYLOR_RATIO",
    "describe_position",
    "equivalent_gamma",
    "layers_at",
    "never_defined",
    "optimizer_name",
    "path",
    "printable",
    "sparkline",
    "speed",
    "summarise",
    "summary_lines",
    "switched_off",
    "undefined",
    "unmoved",
]

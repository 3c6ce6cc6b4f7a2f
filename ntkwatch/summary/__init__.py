"""One run → a summary in words: axes with numbers beside reference points, never a bare "lazy" or "rich"."""

from __future__ import annotations

from ntkwatch.summary.axes import layers_at, path, speed
from ntkwatch.summary.ladder import LADDER, LADDER_ANGLE, LADDER_RHO, place, rung
from ntkwatch.summary.summary import optimizer_name, summarise, summary_lines, switched_off, unmoved
from ntkwatch.summary.text import printable, sparkline
from ntkwatch.summary.undefined import never_defined, undefined

__all__ = [
    "LADDER",
    "LADDER_ANGLE",
    "LADDER_RHO",
    "layers_at",
    "never_defined",
    "optimizer_name",
    "path",
    "place",
    "printable",
    "rung",
    "sparkline",
    "speed",
    "summarise",
    "summary_lines",
    "switched_off",
    "undefined",
    "unmoved",
]

"""Text for a terminal: sparklines, no control characters, wrapped axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

LABEL = 11
BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float | None], width: int = 16) -> str:
    """Values as bars between their least and largest, thinned to at most `width`; · where undefined.

    >>> sparkline([0, 1, None, 7])
    '▁▂·█'
    """
    numbers = [math.nan if v is None else float(v) for v in values]
    if len(numbers) > width:
        numbers = [numbers[round(i * (len(numbers) - 1) / (width - 1))] for i in range(width)]
    finite = [v for v in numbers if math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] if math.isfinite(v) else "·" for v in numbers)


def printable(text: str) -> str:
    """Text without control characters, which could steer a terminal: run and module names come from outside.

    >>> printable("a" + chr(27) + "[31m")
    'a�[31m'
    """
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def wrap(lines: Sequence[tuple[str, str]], width: int) -> str:
    """Axes and texts as lines of at most `width` columns, the texts indented under each other."""
    indent = " " * LABEL
    wrap = textwrap.TextWrapper(width=max(width, 40), subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{label:<{LABEL}}{text}") for label, text in lines)

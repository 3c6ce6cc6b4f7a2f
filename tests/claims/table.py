"""Expected beside measured: the rows that `make claims` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One claim: which, what, what is expected in words, what was measured, and whether it holds."""

    claim: str
    what: str
    expected: str
    measured: float
    holds: bool


def between(claim: str, what: str, value: float, low: float, high: float) -> Row:
    """A claim that a value lies in a band, both ends included; an infinite end is open."""
    if math.isinf(high):
        expected = f"> {low:g}"
    elif math.isinf(low):
        expected = f"< {high:g}"
    else:
        expected = f"{low:g} … {high:g}"
    return Row(claim, what, expected, value, low <= value <= high)


def around(claim: str, what: str, value: float, target: float, share: float = 0.1) -> Row:
    """A claim that a value is the target within a share of it."""
    return Row(claim, what, f"{target:g} ± {share:.0%}", value, abs(value - target) <= share * abs(target))


def show(rows: Iterable[Row]) -> str:
    """A table of expected and measured, side by side."""
    lines = [f"{'claim':<7}{'what':<66}{'expected':>18}{'measured':>12}"]
    lines += [
        f"{r.claim:<7}{r.what:<66}{r.expected:>18}{r.measured:>12.4g}{'' if r.holds else '   ✗ outside'}" for r in rows
    ]
    return "\n".join(lines)

"""The reference ladder: what a Taylor ratio or a kernel angle is as large as, without being a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

# k=2 parity, n=2048, full-batch GD to a loss of .02: output scale γ_0, Taylor ratio, kernel angle (rad), three seeds.
LADDER = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LADDER_RHO = (0.014, 0.048, 0.224, 0.485, 0.690, 0.810)
LADDER_ANGLE = (0.0065, 0.035, 0.180, 0.419, 0.677, 0.830)
LADDER_NOTE = (
    "reference: a two-layer ReLU net on parity with output scale 1/γ0; γ0 .01 is next to linear, 3 is far from it."
)
LINEAR = ("next to linear", "close to linear", "clearly non-linear", "strongly non-linear")
TURNED = ("hardly turned", "turned a little", "clearly turned", "strongly turned")


def rung(value: float, ladder: Sequence[float]) -> float:
    """The γ_0 at which the ladder shows this value (log–log interpolation); 0 below its foot, inf above its top."""
    if value < ladder[0]:
        return 0.0
    for i in range(len(ladder) - 1):
        if value <= ladder[i + 1]:
            share = math.log(value / ladder[i]) / math.log(ladder[i + 1] / ladder[i])
            return float(LADDER[i] * (LADDER[i + 1] / LADDER[i]) ** share)
    return math.inf


def word(gamma: float, words: Sequence[str]) -> str:
    """A rung of the ladder in a word; `words` are for the foot, up to .1, up to .3, and beyond."""
    return words[0] if gamma == 0 else words[1] if gamma < 0.1 else words[2] if gamma < 0.3 else words[3]


def reached(gamma: float) -> str:
    """Where on the ladder a rung is."""
    if gamma == 0:
        return "below the ladder's foot, γ0 .01"
    return "above the ladder's top, γ0 3" if math.isinf(gamma) else f"as the ladder's γ0 {gamma:.2g}"


def place(gamma: float, words: Sequence[str]) -> str:
    """The rung in a word, and where it is."""
    return f"{word(gamma, words)}, {reached(gamma)}"

"""The reference scale: Taylor ratios and kernel angles of a known network; for comparison, not as thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence

# k=2 parity, n=2048, full-batch GD to a loss of .02: output scale γ_0, Taylor ratio, kernel angle (rad), three seeds.
REFERENCE_GAMMA = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
REFERENCE_TAYLOR_RATIO = (0.014, 0.048, 0.224, 0.485, 0.690, 0.810)
REFERENCE_ANGLE = (0.0065, 0.035, 0.180, 0.419, 0.677, 0.830)
REFERENCE_NOTE = (
    "a two-layer ReLU network on parity with output scale 1/γ0; γ0 0.01 is close to linear, 3 is far from it."
)
LINEAR = ("next to linear", "close to linear", "clearly non-linear", "strongly non-linear")
TURNED = ("hardly turned", "turned a little", "clearly turned", "strongly turned")


def equivalent_gamma(value: float, reference: Sequence[float]) -> float:
    """The γ_0 at which the reference has this value (log–log interpolation); 0 below its range, inf above it."""
    if value < reference[0]:
        return 0.0
    for i in range(len(reference) - 1):
        if value <= reference[i + 1]:
            share = math.log(value / reference[i]) / math.log(reference[i + 1] / reference[i])
            return float(REFERENCE_GAMMA[i] * (REFERENCE_GAMMA[i + 1] / REFERENCE_GAMMA[i]) ** share)
    return math.inf


def description(gamma: float, words: Sequence[str]) -> str:
    """One of four `words`: for γ_0 = 0 (below the range), below 0.1, below 0.3, and beyond."""
    return words[0] if gamma == 0 else words[1] if gamma < 0.1 else words[2] if gamma < 0.3 else words[3]


def describe_gamma(gamma: float) -> str:
    """Where γ_0 lies on the reference scale."""
    if gamma == 0:
        return "below the reference range, γ0 < 0.01"
    return "above the reference range, γ0 > 3" if math.isinf(gamma) else f"as the reference at γ0 {gamma:.2g}"


def describe_position(gamma: float, words: Sequence[str]) -> str:
    """One of `words` for γ_0, and where it lies on the reference scale."""
    return f"{description(gamma, words)}, {describe_gamma(gamma)}"

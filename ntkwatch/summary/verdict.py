"""The verdict: the axes of one run in a few sentences, each with its numbers and what they are measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ntkwatch.summary.axes import agreement, alignment, describe_heading
from ntkwatch.summary.recorded import NEGLIGIBLE_GAIN, STABILITY_BOUNDS, formatted, last, off_start
from ntkwatch.summary.reference_scale import (
    LINEAR,
    REFERENCE_ANGLE,
    REFERENCE_TAYLOR_RATIO,
    TURNED,
    describe_gamma,
    description,
    equivalent_gamma,
)

if TYPE_CHECKING:
    import pandas as pd

NOTABLE_LOG_SCALE = 0.5  # |log of the trace ratio|: growth or shrinking worth a word


def verdict(metrics: pd.DataFrame, reasons: Mapping[str, str] | None = None) -> str:
    """Strength, direction, quality, stability, and where they disagree; what was not recorded is left out.

    reasons: of what is undefined at the last step.
    """
    said = [_strength(metrics), _direction(metrics), _quality(metrics), _stability(metrics)]
    said.append(_if_lazy(metrics, (reasons or {}).get("loss_if_lazy", "")))
    return " ".join(part for part in (*said, agreement(metrics)) if part)


def _strength(metrics: pd.DataFrame) -> str:
    rho, angle, scale, features = (
        last(metrics, name) for name in ("taylor_ratio", "kernel_angle", "kernel_scale", "feature_angle")
    )
    said = []
    if rho is not None:
        gamma = equivalent_gamma(rho, REFERENCE_TAYLOR_RATIO)
        said.append(
            f"the run is {description(gamma, LINEAR)} in its weights "
            f"(Taylor ratio {formatted(rho)}, {describe_gamma(gamma)})"
        )
    if angle is not None:
        gamma = equivalent_gamma(angle, REFERENCE_ANGLE)
        said.append(f"its kernel {description(gamma, TURNED)} ({formatted(angle)} rad, {describe_gamma(gamma)})")
    if scale is not None and abs(scale) > NOTABLE_LOG_SCALE:
        alone = (
            ", which is nearly all of its motion"
            if angle is not None and equivalent_gamma(angle, REFERENCE_ANGLE) == 0
            else ""
        )
        said.append(f"its trace changed × {formatted(math.exp(scale))}{alone}")
    if features is not None:
        said.append(f"the last hidden features turned {formatted(features)} rad")
    return _sentence("; ".join(said))


def _direction(metrics: pd.DataFrame) -> str:
    start, end, z0, z1 = alignment(metrics)
    found = describe_heading(metrics)
    if start is None or end is None or z0 is None or z1 is None or not found:
        return ""
    return f"Alignment with the targets {end - start:+.3f} (z {z0:.1f} → {z1:.1f}): {found}."


def _quality(metrics: pd.DataFrame) -> str:
    gain = last(metrics, "after_kernel_gain")
    if gain is None:
        return ""
    than = "no better than" if abs(gain) < NEGLIGIBLE_GAIN else "better than" if gain > 0 else "worse than"
    return f"As a kernel machine it is {than} at the start ({gain:+.3f} held-out accuracy)."


def _stability(metrics: pd.DataFrame) -> str:
    if "stability_ratio" not in metrics or not float(metrics["stability_ratio"].max()) > STABILITY_BOUNDS[2]:
        return ""
    highest, now = float(metrics["stability_ratio"].max()), last(metrics, "stability_ratio")
    scale = last(metrics, "kernel_scale")
    settled = now is not None and now <= STABILITY_BOUNDS[2]
    since = f", {formatted(now)} at the end" if now is not None and now < highest else ""
    shrunk = (
        "; the kernel shrank until it was stable (a catapult)" if settled and scale is not None and scale < 0 else ""
    )
    return f"The learning rate exceeded the largest stable one, up to × {formatted(highest)}{since}{shrunk}."


def _if_lazy(metrics: pd.DataFrame, reason: str) -> str:
    loss, lazy = last(metrics, "loss"), last(metrics, "loss_if_lazy")
    if loss is None or (lazy is None and "diverged" not in reason):
        return ""
    linear = f"the linearised network's, {formatted(lazy)}" if lazy is not None else "the linearised network diverged"
    return f"Loss on the probes {formatted(loss)}; {linear}{off_start(metrics)}."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""

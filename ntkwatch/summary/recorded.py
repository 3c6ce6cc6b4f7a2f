"""Axes of the summary that are reported where they were recorded: features, quality, stability, forecast, self-test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

STABILITY_BOUNDS = (0.5, 0.95, 1.05)  # of the stability ratio: inside, near, at, beyond; 1 is the edge
MAX_PASSING_RATIO, MIN_FAILING_RATIO = (
    0.65,
    0.95,
)  # of the self-test: ½ where all is right, 1 where the error is the kernel's own
MAX_START_ERROR = 0.1  # of the run's first gradient: a forecast that is further off forecasts something else
NEGLIGIBLE_GAIN = 0.02  # accuracy: below this a gain is a probe or two


def recorded(metrics: pd.DataFrame) -> list[tuple[str, str]]:
    """(axis, text) of each axis whose numbers are there at the last step of `metrics`."""
    lines = [("Features", features(metrics)), ("Quality", quality(metrics)), ("Labels", power(metrics))]
    lines += [("Stability", stability(metrics)), ("Forecast", forecast(metrics)), ("Self-test", self_test(metrics))]
    return [line for line in lines if line[1]]


def features(metrics: pd.DataFrame) -> str:
    """How far the last hidden layer's features and the weights moved."""
    angle, cka = last(metrics, "feature_angle"), last(metrics, "feature_cka")
    update, alignment = last(metrics, "spectral_update_max"), last(metrics, "neural_feature_correlation_mean")
    said = []
    if angle is not None:
        near = f" (CKA with the start {formatted(cka)})" if cka is not None else ""
        said.append(f"The last hidden layer's features turned {formatted(angle)} rad{near}.")
    if update is not None:
        said.append(f"The weight that moved most changed by {formatted(update)} times its size, in spectral norm.")
    if alignment is not None:
        start = first(metrics, "neural_feature_correlation_mean")
        was = f"{formatted(start)} → " if start is not None else ""
        said.append(f"Weights and gradients correlate {was}{formatted(alignment)}.")
    return " ".join(said)


def quality(metrics: pd.DataFrame) -> str:
    """Whether the kernel after training classifies better than the one before."""
    gain = last(metrics, "after_kernel_gain")
    if gain is None:
        return ""
    text = f"Regression with the current kernel, compared with the first, on held-out halves of the probes: {gain:+.3f}"
    if abs(gain) < NEGLIGIBLE_GAIN:
        return f"{text} accuracy: no difference (a saturated task shows none either)."
    return f"{text} accuracy: {'better' if gain > 0 else 'worse'}."


def power(metrics: pd.DataFrame) -> str:
    """Where in the spectrum the targets lie, and how hard they are to fit, beside shuffled labels."""
    auc, null = last(metrics, "power_auc"), last(metrics, "power_auc_null")
    own, random = last(metrics, "complexity"), last(metrics, "complexity_random")
    said = []
    if auc is not None and null is not None:
        start = first(metrics, "power_auc")
        was = f"{start:.3f} → " if start is not None else ""
        said.append(f"Targets in the kernel's top directions {was}{auc:.3f} (shuffled labels {null:.3f}).")
    if own is not None and random is not None:
        said.append(f"Complexity {formatted(own)}, shuffled labels {formatted(random)}.")
    return " ".join(said)


def stability(metrics: pd.DataFrame) -> str:
    """The learning rate against the largest stable one, and whether overshoot is instability."""
    ratio, limit = last(metrics, "stability_ratio"), last(metrics, "max_stable_lr")
    error, scale = last(metrics, "linearization_error"), last(metrics, "kernel_scale")
    highest = float(metrics["stability_ratio"].max()) if ratio is not None else math.nan
    said = []
    if ratio is not None:
        inside, near, beyond = STABILITY_BOUNDS
        words = (
            "well inside the edge" if ratio < inside else "inside the edge" if ratio < near
            else "on the edge" if ratio <= beyond else "beyond the edge"
        )  # fmt: skip
        most = f"; its maximum was {formatted(highest)}" if highest > max(ratio, beyond) else ""
        rate = f" (largest stable learning rate {formatted(limit)})" if limit is not None else ""
        said.append(f"Stability ratio {formatted(ratio)}{rate}: {words} at 1{most}. Gauss–Newton on the probes.")
    if error is not None and error > 1:
        unstable = highest > 1 or (scale is not None and scale < 0)
        meaning = (
            "with a ratio above 1 or a falling scale this is an instability"
            if unstable else "without a ratio above 1 or a falling scale it is not an instability"
        )  # fmt: skip
        said.append(f"The linearisation overshot the motion (R {formatted(error)}): {meaning}.")
    return " ".join(said)


def forecast(metrics: pd.DataFrame) -> str:
    """The run against its linearised twin."""
    loss, lazy, error = (last(metrics, name) for name in ("loss", "loss_if_lazy", "forecast_error"))
    if loss is None or lazy is None:
        return ""
    text = f"Loss on the probes {formatted(loss)}; the linearised network on the same batches, {formatted(lazy)}"
    apart = f" (they differ by {formatted(error)} of at most 1)" if error is not None else ""
    return f"{text}{apart}{off_start(metrics)}."


def off_start(metrics: pd.DataFrame) -> str:
    """A warning where the forecast was not trained on what the run is trained on."""
    off = last(metrics, "forecast_start_error")
    if off is None or off < MAX_START_ERROR:
        return ""
    return (
        f"; but its first gradient differed from the run's by {off:.0%} (dropout, BatchNorm, or another loss), "
        "so the difference does not measure laziness"
    )


def self_test(metrics: pd.DataFrame) -> str:
    """Whether the kernel predicted one gradient step of the model it was measured on."""
    halving, error = first(metrics, "one_step_halving"), first(metrics, "one_step_error")
    if halving is None or error is None:
        return ""
    said = "undecided: kinks such as those of ReLU lie closer to the probes than a step that rounding permits"
    if halving < MAX_PASSING_RATIO:
        said = "passed"
    elif halving > MIN_FAILING_RATIO:
        said = "FAILED: check the mode, and tied or frozen parameters"
    share = f"its error × {formatted(halving)} at half the step (× ½ is expected)"
    return f"A small gradient step was predicted to within {error:.2%} of it, {share}: {said}."


def wide(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """How far the kernel is from that of the infinitely wide network, and how that one passes signals."""
    start, end = first(metrics, "distance_to_infinite"), last(metrics, "distance_to_infinite")
    if start is None:
        return ""
    now = "" if end is None or len(metrics) < 2 else f", {formatted(end)} now"
    advice = str(manifest.get("infinite") or "").partition(". ")[2]
    return f"The first kernel was {formatted(start)} of its norm away from the infinitely wide network's{now}. {advice}"


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def last(metrics: pd.DataFrame, name: str) -> float | None:
    """The metric at the last step, None where undefined or not recorded."""
    return _defined(metrics[name].iloc[-1]) if name in metrics else None


def first(metrics: pd.DataFrame, name: str) -> float | None:
    """The metric at the first step, None where undefined or not recorded."""
    return _defined(metrics[name].iloc[0]) if name in metrics else None


def with_error(metrics: pd.DataFrame, name: str, value: float) -> str:
    """The value, with its jackknife error where one was recorded."""
    error = last(metrics, f"{name}_se")
    return formatted(value) if error is None else f"{formatted(value)} ± {error:.2g}"


def _defined(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def formatted(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"

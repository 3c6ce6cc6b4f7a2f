"""The axes of a run: how far it is from linear, how far the kernel turned, towards what, how fast, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ntkwatch.summary.recorded import first, formatted, last, with_error
from ntkwatch.summary.reference_scale import (
    LINEAR,
    REFERENCE_ANGLE,
    REFERENCE_GAMMA,
    REFERENCE_TAYLOR_RATIO,
    TURNED,
    describe_position,
    equivalent_gamma,
)

if TYPE_CHECKING:
    import pandas as pd

DISAGREEMENT_FACTOR = 5.0  # a factor in γ_0, one and a half steps of the reference scale
NEGLIGIBLE_CHANGE = 0.005  # a change of alignment that is none
NULL_Z = 2.0  # |z| below this is what shuffled labels give
MIN_STEPS_FOR_SPEED = 4  # probes


def strength(metrics: pd.DataFrame) -> list[tuple[str, str]]:
    """Three axes apart: how far from the linearisation, how far the kernel turned, how much it grew."""
    rho, angle, scale, relative = (
        last(metrics, n) for n in ("taylor_ratio", "kernel_angle", "kernel_scale", "relative_change")
    )
    lines = []
    if rho is not None:
        said = with_error(metrics, "taylor_ratio", rho)
        lines.append(
            (
                "Linearity",
                f"Taylor ratio {said}: {describe_position(equivalent_gamma(rho, REFERENCE_TAYLOR_RATIO), LINEAR)}.",
            )
        )
    if angle is not None:
        said = with_error(metrics, "kernel_angle", angle)
        lines.append(
            (
                "Rotation",
                f"Kernel angle {said} rad: {describe_position(equivalent_gamma(angle, REFERENCE_ANGLE), TURNED)}.",
            )
        )
    if scale is not None:
        mixed = "" if relative is None else f" Relative change {formatted(relative)} mixes rotation and scale."
        lines.append(("Scale", f"The trace changed × {formatted(math.exp(scale))} (log {scale:+.3g}).{mixed}"))
    return lines


def agreement(metrics: pd.DataFrame) -> str:
    """How Taylor ratio and kernel angle disagree, measured on the reference scale; empty where they agree."""
    rho, angle, scale = (last(metrics, n) for n in ("taylor_ratio", "kernel_angle", "kernel_scale"))
    if rho is None or angle is None:
        return ""
    by_rho, by_angle = equivalent_gamma(rho, REFERENCE_TAYLOR_RATIO), equivalent_gamma(angle, REFERENCE_ANGLE)
    low, high = sorted(min(max(g, REFERENCE_GAMMA[0]), REFERENCE_GAMMA[-1]) for g in (by_rho, by_angle))
    if high / low < DISAGREEMENT_FACTOR:
        return ""
    if by_rho < by_angle:
        return "The axes disagree: the kernel turned further than the outputs departed from their linearisation."
    resized = scale is not None and abs(scale) > 0.5
    why = "; a change of the weights' scale alone has this effect (see the scale)" if resized else ""
    return f"The axes disagree: the outputs departed from their linearisation further than the kernel turned{why}."


def direction(metrics: pd.DataFrame, source: str) -> str:
    """Alignment with the targets from the first probe to the last, against shuffled labels."""
    start, end, z0, z1 = alignment(metrics)
    if start is None or end is None:
        return ""
    split = {"val": " on held-out probes", "train": " on training probes"}.get(source, "")
    text = f"Alignment with the targets{split} {start:.3f} → {end:.3f} ({end - start:+.3f})"
    if z0 is None or z1 is None:
        return f"{text}; without a z-score it cannot be distinguished from chance."
    text += f", z {z0:.1f} → {z1:.1f} against shuffled labels"
    found = describe_heading(metrics)
    if found == CONTRADICTION:
        return f"{text}. These disagree: prefer the z-score, which corrects for the shape of the kernel."
    return f"{text}: {found}."


CONTRADICTION = "alignment and its z-score disagree"


def describe_heading(metrics: pd.DataFrame) -> str:
    """What the alignment says, in a few words; nothing where it or its z-score is not there."""
    start, end, z0, z1 = alignment(metrics)
    if start is None or end is None or z0 is None or z1 is None:
        return ""
    if abs(z1) < NULL_Z:
        return "within chance"
    if abs(end - start) < NEGLIGIBLE_CHANGE:
        return "unchanged"
    if (end - start) * (z1 - z0) < 0:
        return CONTRADICTION
    return f"it turned {'towards' if end > start else 'away from'} the targets"


def alignment(metrics: pd.DataFrame) -> tuple[float | None, ...]:
    """Alignment at the first and the last probe, and both z-scores."""
    names = ("centered_alignment", "centered_alignment_z")
    return tuple(of(metrics, name) for name in names for of in (first, last))


def path(metrics: pd.DataFrame) -> pd.Series | None:
    """Length of the kernel's path up to each step, Σ angle over successive probes, rad; None where undefined."""
    if "kernel_velocity" not in metrics or len(metrics) < 2:
        return None
    steps = metrics.index.to_series()
    pieces = (metrics["kernel_velocity"] * steps.diff()).iloc[1:]
    return None if pieces.isna().any() else pieces.cumsum()


def speed(metrics: pd.DataFrame) -> str:
    """When half of the kernel's path was covered, and how straight the path is."""
    travelled, end = path(metrics), int(metrics.index[-1])
    if travelled is None or travelled.iloc[-1] <= 0:
        return ""
    if len(metrics) < MIN_STEPS_FOR_SPEED:
        return f"{len(metrics)} probes are too few to say when the kernel moved."
    total = float(travelled.iloc[-1])
    half = int(travelled.index[(travelled >= total / 2).to_numpy().argmax()])
    text = f"Half of the kernel's path ({formatted(total)} rad) was covered by step {half:,} of {end:,}"
    text += f" ({half / end:.1%})"
    angle = last(metrics, "kernel_angle")
    if angle is not None:
        text += f"; directness {min(angle / total, 1.0):.2f} (1 is straight)"
    velocity = metrics["kernel_velocity"].dropna()
    now, most = formatted(float(velocity.iloc[-1])), formatted(float(velocity.max()))
    return f"{text}. It now turns {now} rad per step; the maximum was {most}."


def where(layers: Mapping[str, Mapping[str, float]]) -> str:
    """Which layers hold the kernel, and which turned most and least."""
    shares = {name: m["share"] for name, m in layers.items() if "share" in m}
    angles = {name: m["angle"] for name, m in layers.items() if "angle" in m}
    if len(shares) < 2:
        return ""
    largest = sorted(shares, key=lambda name: -shares[name])[:3]
    text = "Share of the trace: " + ", ".join(f"{name} {shares[name]:.0%}" for name in largest)
    text += f", {len(shares) - 3} more" if len(shares) > 3 else ""
    if len(angles) < 2:
        return f"{text}."
    most, least = max(angles, key=lambda n: angles[n]), min(angles, key=lambda n: angles[n])
    return f"{text}. Turned most: {most} ({formatted(angles[most])} rad); least: {least} ({formatted(angles[least])})."


def layers_at(layer_metrics: pd.DataFrame, step: int) -> dict[str, dict[str, float]]:
    """Module name -> its defined metrics at a step; the root module is called `model`."""
    found: dict[str, dict[str, float]] = {}
    if step in layer_metrics.index:
        for (module, metric), value in layer_metrics.loc[step].dropna().items():
            found.setdefault(module or "model", {})[metric] = float(value)
    return found

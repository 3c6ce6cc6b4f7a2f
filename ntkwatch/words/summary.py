"""One run → a summary in words: axes with numbers beside reference points, never a bare "lazy" or "rich".

Strength (how far from its linearisation, how far the kernel turned), direction (towards the targets or not), speed,
where (which layers), cost. The reference ladder is a two-layer ReLU network on parity whose output scale 1/γ sets how
far it leaves the linear regime; it calibrates the words, it is no threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ntkwatch.words.ladder import LADDER, LADDER_ANGLE, LADDER_NOTE, LADDER_RHO, LINEAR, TURNED, place, rung
from ntkwatch.words.recorded import first, last, number, recorded, wide, with_error
from ntkwatch.words.text import printable, wrap

if TYPE_CHECKING:
    import pandas as pd

DISAGREE = 5.0  # a factor in γ_0, a rung and a half of the ladder
STEADY = 0.005  # a change of alignment that is none
NULL_Z = 2.0  # |z| below this is what shuffled labels give
FEWEST_FOR_SPEED = 4  # probes
STILL = ("Stability", "Self-test", "Labels")  # axes that say something before anything moved
REGIME = (
    "One run states its own linearity. Whether this is a lazy regime needs a sweep of the width or the output scale: "
    "ntkwatch widths RUN…"
)


class Readable(Protocol):
    """What a summary needs of a run; `Run` is one."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> pd.DataFrame: ...
    @property
    def reasons(self) -> Mapping[int, Mapping[str, str]]: ...
    @property
    def layer_metrics(self) -> pd.DataFrame: ...


def summarise(run: Readable, width: int = 79) -> str:
    """The run in words at its last measured step, wrapped at `width` columns.

    >>> from types import SimpleNamespace
    >>> import pandas as pd
    >>> empty = pd.DataFrame()
    >>> print(summarise(SimpleNamespace(manifest={}, metrics=empty, reasons={}, layer_metrics=empty)))
    Run        unnamed model. No probe has been recorded yet.
    """
    return wrap(summary_lines(run), width)


def summary_lines(run: Readable) -> list[tuple[str, str]]:
    """The summary as (axis, text) pairs; a text that goes on with the axis above has an empty one."""
    if len(run.metrics) == 0:
        return [("Run", f"{_header(run.manifest)}. No probe has been recorded yet.")]
    lines = [("Run", f"{_header(run.manifest)}; {_probing(run.manifest)}. {_span(run.metrics)}.")]
    seen = _finite(run)
    begin, end, newest = int(seen.metrics.index[0]), int(seen.metrics.index[-1]), int(run.metrics.index[-1])
    if end < newest:
        lines.append(("Divergence", f"{_why_not_finite(run)} The numbers below are of step {end:,}, the last before."))
    if end == begin or unmoved(seen.metrics):
        lines.append(("Motion", f"Nothing has moved yet: the kernel at step {end} is the one at step {begin}."))
        lines += [line for line in recorded(seen.metrics) if line[0] in STILL]
    else:
        lines += [*_strength(seen), ("Direction", _direction(seen)), ("Speed", speed(seen.metrics))]
        lines += [("Where", _where(layers_at(run.layer_metrics, end))), *recorded(seen.metrics)]
        lines.append(("Caution", _bias(run.manifest)))
    lines += [("Cost", _cost(run)), ("Undefined", _undefined(run.reasons.get(end) or {}))]
    lines += [("Baseline", run.manifest.get("baseline") or ""), ("Limit", wide(run.metrics, run.manifest))]
    lines.append(("Regime", REGIME))
    lines.append(("Ladder", LADDER_NOTE if any("γ0" in text for _, text in lines) else ""))
    return [(label, printable(text)) for label, text in lines if text]


@dataclass(frozen=True)
class _Upto:
    """A run's metrics up to some step, for the axes."""

    manifest: Mapping[str, Any]
    metrics: pd.DataFrame
    reasons: Mapping[int, Mapping[str, str]]
    layer_metrics: pd.DataFrame


def _finite(run: Readable) -> Readable:
    """The run up to the last step whose kernel was finite; all of it where none was."""
    steps = [s for s in run.metrics.index if not any("kernel is not finite" in why for why in _why(run, s))]
    metrics = run.metrics.loc[: steps[-1]] if steps else run.metrics
    return _Upto(run.manifest, metrics, run.reasons, run.layer_metrics)


def _why(run: Readable, step: int) -> list[str]:
    return list((run.reasons.get(int(step)) or {}).values())


def _why_not_finite(run: Readable) -> str:
    """Since when, and why, the kernel is not finite."""
    broken = [s for s in run.metrics.index if any("kernel is not finite" in why for why in _why(run, s))]
    why = next(why for why in _why(run, broken[-1]) if "kernel is not finite" in why)
    return f"At step {int(broken[-1]):,} {why}."


def unmoved(metrics: pd.DataFrame) -> bool:
    """True where no defined measure of motion differs from zero at any step."""
    names = [n for n in ("kernel_angle", "relative_change", "taylor_ratio", "parameter_distance") if n in metrics]
    return not (metrics[names].fillna(0.0).abs() > 0).any(axis=None)


def _strength(run: Readable) -> list[tuple[str, str]]:
    """Three axes apart: how far from the linearisation, how far the kernel turned, how much it grew."""
    rho, angle, scale, relative = (
        last(run.metrics, n) for n in ("taylor_ratio", "kernel_angle", "kernel_scale", "relative_change")
    )
    lines = []
    if rho is not None:
        said = with_error(run.metrics, "taylor_ratio", rho)
        lines.append(("Linearity", f"Taylor ratio {said}: {place(rung(rho, LADDER_RHO), LINEAR)}."))
    if angle is not None:
        said = with_error(run.metrics, "kernel_angle", angle)
        lines.append(("Rotation", f"Kernel angle {said} rad: {place(rung(angle, LADDER_ANGLE), TURNED)}."))
    if scale is not None:
        mixed = "" if relative is None else f" Relative change {number(relative)} mixes rotation and scale."
        lines.append(("Scale", f"The trace went × {number(math.exp(scale))} (log {scale:+.3g}).{mixed}"))
    if rho is not None and angle is not None:
        lines.append(("", _agreement(rung(rho, LADDER_RHO), rung(angle, LADDER_ANGLE), scale)))
    return lines


def _agreement(by_rho: float, by_angle: float, scale: float | None) -> str:
    low, high = sorted(min(max(g, LADDER[0]), LADDER[-1]) for g in (by_rho, by_angle))
    if high / low < DISAGREE:
        return ""
    if by_rho < by_angle:
        return "Axes disagree: the kernel turned further than the outputs left their linearisation."
    resized = scale is not None and abs(scale) > 0.5
    why = "; growth or shrinking of the weights alone does that (see the scale)" if resized else ""
    return f"Axes disagree: the outputs left their linearisation further than the kernel turned{why}."


def _bias(manifest: Mapping[str, Any]) -> str:
    n, reduction = (manifest.get("probes") or {}).get("n"), manifest.get("reduction")
    few = f"{n} probes understate the angle (from 64 on it is steady)." if isinstance(n, int) and n < 64 else ""
    several = reduction == "trace" and (manifest.get("n_outputs") or 1) > 1
    trace = "The full kernel's angle is larger than this trace kernel's, by a quarter or more." if several else ""
    return f"{few} {trace}".strip()


def _direction(run: Readable) -> str:
    start, end = first(run.metrics, "centered_alignment"), last(run.metrics, "centered_alignment")
    z0, z1 = first(run.metrics, "centered_alignment_z"), last(run.metrics, "centered_alignment_z")
    if start is None or end is None:
        return ""
    source = str((run.manifest.get("probes") or {}).get("source"))
    split = {"val": " on held-out probes", "train": " on training probes"}.get(source, "")
    change = end - start
    text = f"Alignment with the targets{split} {start:.3f} → {end:.3f} ({change:+.3f})"
    if z0 is None or z1 is None:
        return f"{text}; without a z-score it cannot be told from chance."
    text += f", z {z0:.1f} → {z1:.1f} against shuffled labels"
    if abs(z1) < NULL_Z:
        return f"{text}: within chance."
    if abs(change) < STEADY:
        return f"{text}: unchanged."
    if change * (z1 - z0) < 0:
        return f"{text}. These disagree: read the z-score, which nets out the kernel's own shape."
    return f"{text}: it turned {'towards' if change > 0 else 'away from'} the targets."


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
    if len(metrics) < FEWEST_FOR_SPEED:
        return f"{len(metrics)} probes are too few to say when the kernel moved."
    total = float(travelled.iloc[-1])
    half = int(travelled.index[(travelled >= total / 2).to_numpy().argmax()])
    text = f"Half of the kernel's path ({number(total)} rad) was covered by step {half:,} of {end:,} ({half / end:.1%})"
    angle = last(metrics, "kernel_angle")
    if angle is not None:
        text += f"; directness {min(angle / total, 1.0):.2f} (1 is straight)"
    velocity = metrics["kernel_velocity"].dropna()
    now, most = number(float(velocity.iloc[-1])), number(float(velocity.max()))
    return f"{text}. It now turns {now} rad a step; its fastest was {most}."


def _where(layers: Mapping[str, Mapping[str, float]]) -> str:
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
    return f"{text}. Turned most: {most} ({number(angles[most])} rad); least: {least} ({number(angles[least])})."


def _cost(run: Readable) -> str:
    overhead, engine = last(run.metrics, "overhead"), run.manifest.get("engine")
    budget = run.manifest.get("budget")
    if overhead is None:
        return ""
    limit = f" (budget {budget:.1%} after a free allowance)" if isinstance(budget, int | float) else ""
    count = len(run.metrics)
    probes = f"{count} probe{'s' * (count != 1)}"
    return f"{overhead:.2%} of wall time{limit}, {probes}{f', {engine} engine' if engine else ''}."


def _undefined(reasons: Mapping[str, str]) -> str:
    causes: dict[str, list[str]] = {}
    for name, why in reasons.items():
        causes.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in causes.items())


def _header(manifest: Mapping[str, Any]) -> str:
    count, optimizer = manifest.get("n_parameters"), optimizer_name(manifest)
    parts = [str(manifest.get("model") or "unnamed model")]
    parts += [f"{count:,} trained parameters"] if isinstance(count, int) else []
    parts += [optimizer] if optimizer else []
    return ", ".join(parts)


def optimizer_name(manifest: Mapping[str, Any]) -> str | None:
    """The optimizer's class, several joined by +; None where the record names none."""
    named = manifest.get("optimizer")
    return " + ".join(map(str, named)) if isinstance(named, list) and named else str(named) if named else None


def _probing(manifest: Mapping[str, Any]) -> str:
    probes = manifest.get("probes") or {}
    source = f" from {probes['source']}" if probes.get("source") else ""
    kind = f"{manifest.get('reduction', '?')} kernel, {manifest.get('mode', '?')} mode"
    return f"{probes.get('n', '?')} probes{source}, {kind}"


def _span(metrics: pd.DataFrame) -> str:
    if len(metrics) == 1:
        return f"Measured once, at step {metrics.index[0]:,}"
    return f"Measured {len(metrics)} times, steps {metrics.index[0]:,} to {metrics.index[-1]:,}"


def layers_at(layer_metrics: pd.DataFrame, step: int) -> dict[str, dict[str, float]]:
    """Module name -> its defined metrics at a step; the root module is called `model`."""
    found: dict[str, dict[str, float]] = {}
    if step in layer_metrics.index:
        for (module, metric), value in layer_metrics.loc[step].dropna().items():
            found.setdefault(module or "model", {})[metric] = float(value)
    return found

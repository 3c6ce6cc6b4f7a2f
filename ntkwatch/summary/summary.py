"""One run → a summary in words: axes with numbers beside reference points, never a bare "lazy" or "rich".

Strength (how far from its linearisation, how far the kernel turned), direction (towards the targets or not), speed,
where (which layers), cost. The reference is a two-layer ReLU network on parity whose output scale 1/γ sets how
far it departs from the linear regime; it calibrates the words and is not a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ntkwatch.summary.axes import direction, layers_at, speed, strength, where
from ntkwatch.summary.recorded import last, recorded, wide
from ntkwatch.summary.reference_scale import REFERENCE_NOTE
from ntkwatch.summary.text import printable, wrap
from ntkwatch.summary.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd

AXES_BEFORE_MOTION = ("Stability", "Self-test", "Labels")  # axes that say something before anything moved
MOTION = ("kernel_angle", "kernel_distance", "relative_change", "taylor_ratio", "parameter_distance", "forecast_error")
REGIME = (
    "One run states its own linearity. Whether this is a lazy regime needs a sweep of the width or the output scale: "
    "ntkwatch widths RUN…"
)


class RunLike(Protocol):
    """What a summary needs of a run; `Run` is one."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The record's manifest."""

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per measured step, one column per metric."""

    @property
    def reasons(self) -> Mapping[int, Mapping[str, str]]:
        """Step -> metric -> why it is undefined."""

    @property
    def layer_metrics(self) -> pd.DataFrame:
        """One row per measured step; columns (module, metric)."""


def summarise(run: RunLike, width: int = 79) -> str:
    """The run in words at its last measured step, wrapped at `width` columns.

    >>> from types import SimpleNamespace
    >>> import pandas as pd
    >>> empty = pd.DataFrame()
    >>> print(summarise(SimpleNamespace(manifest={}, metrics=empty, reasons={}, layer_metrics=empty)))
    Run        unnamed model. No probe has been recorded yet.
    """
    return wrap(summary_lines(run), width)


def summary_lines(run: RunLike) -> list[tuple[str, str]]:
    """The summary as (axis, text) pairs; a text that goes on with the axis above has an empty one."""
    if len(run.metrics) == 0:
        lines = [("Run", f"{_header(run.manifest)}. No probe has been recorded yet."), ("Watch", _watch(run.manifest))]
    else:
        lines = _measured(run)
    return [(label, printable(text)) for label, text in lines if text]


def _measured(run: RunLike) -> list[tuple[str, str]]:
    """The axes of a run with a probe or more; those of which there is nothing to tell are empty."""
    lines = [("Run", f"{_header(run.manifest)}; {_probing(run.manifest)}. {_span(run.metrics)}.")]
    lines.append(("Watch", _watch(run.manifest)))
    seen = _finite(run)
    begin, end, newest = int(seen.metrics.index[0]), int(seen.metrics.index[-1]), int(run.metrics.index[-1])
    if end < newest:
        lines.append(("Divergence", f"{_why_not_finite(run)} The numbers below are of step {end:,}, the last before."))
    if end == begin or unmoved(seen.metrics):
        still = " (the learning rate is 0)" if "the learning rate is 0" in _why(run, end) else ""
        lines.append(("Motion", f"Nothing has moved yet: the kernel at step {end} is the one at step {begin}{still}."))
        lines += [line for line in recorded(seen.metrics) if line[0] in AXES_BEFORE_MOTION]
    else:
        lines += [("Verdict", verdict(seen.metrics, run.reasons.get(end))), *strength(seen.metrics)]
        lines += [("Direction", direction(seen.metrics, _source(run))), ("Speed", speed(seen.metrics))]
        lines += [("Where", where(layers_at(run.layer_metrics, end))), *recorded(seen.metrics)]
        lines.append(("Caution", _bias(run.manifest)))
    tested = any(label == "Self-test" and text for label, text in lines)
    lines += [("Cost", _cost(run)), ("Undefined", _undefined(run.reasons.get(end) or {}, tested))]
    lines += [("Baseline", run.manifest.get("baseline") or ""), ("Limit", wide(run.metrics, run.manifest))]
    lines.append(("Regime", REGIME))
    lines.append(("Reference", REFERENCE_NOTE if any("γ0" in text for _, text in lines) else ""))
    return lines


@dataclass(frozen=True)
class _TruncatedRun:
    """A run's metrics up to some step, for the axes."""

    manifest: Mapping[str, Any]
    metrics: pd.DataFrame
    reasons: Mapping[int, Mapping[str, str]]
    layer_metrics: pd.DataFrame


def _finite(run: RunLike) -> RunLike:
    """The run up to the last step whose kernel was finite; all of it where none was."""
    steps = [s for s in run.metrics.index if not any("kernel is not finite" in why for why in _why(run, s))]
    metrics = run.metrics.loc[: steps[-1]] if steps else run.metrics
    return _TruncatedRun(run.manifest, metrics, run.reasons, run.layer_metrics)


def _why(run: RunLike, step: int) -> list[str]:
    return list((run.reasons.get(int(step)) or {}).values())


def _why_not_finite(run: RunLike) -> str:
    """Since when, and why, the kernel is not finite."""
    broken = [s for s in run.metrics.index if any("kernel is not finite" in why for why in _why(run, s))]
    why = next(why for why in _why(run, broken[-1]) if "kernel is not finite" in why)
    return f"At step {int(broken[-1]):,} {why}."


def unmoved(metrics: pd.DataFrame) -> bool:
    """True where no defined measure of motion differs from zero at any step, and there is one."""
    names = [name for name in MOTION if name in metrics]
    return bool(names) and not (metrics[names].fillna(0.0).abs() > 0).any(axis=None)


def _bias(manifest: Mapping[str, Any]) -> str:
    n, reduction = (manifest.get("probes") or {}).get("n"), manifest.get("reduction")
    few = f"{n} probes understate the angle (from 64 on it is steady)." if isinstance(n, int) and n < 64 else ""
    several = reduction == "trace" and (manifest.get("n_outputs") or 1) > 1
    trace = "The full kernel's angle is larger than this trace kernel's, by a quarter or more." if several else ""
    return f"{few} {trace}".strip()


def _cost(run: RunLike) -> str:
    overhead, engine = last(run.metrics, "overhead"), run.manifest.get("engine")
    budget = run.manifest.get("budget")
    if overhead is None:
        return ""
    limit = f" (budget {budget:.1%} after a free allowance)" if isinstance(budget, int | float) else ""
    count = len(run.metrics)
    probes = f"{count} probe{'s' * (count != 1)}"
    return f"{overhead:.2%} of wall time{limit}, {probes}{f', {engine} engine' if engine else ''}."


def _undefined(reasons: Mapping[str, str], tested: bool) -> str:
    """By cause; the self-test of the first step has its own axis."""
    causes: dict[str, list[str]] = {}
    for name, why in reasons.items():
        if tested and name.startswith("one_step_"):
            continue
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


def _source(run: RunLike) -> str:
    return str((run.manifest.get("probes") or {}).get("source"))


def _probing(manifest: Mapping[str, Any]) -> str:
    probes = manifest.get("probes") or {}
    source = f" from {probes['source']}" if probes.get("source") else ""
    kind = f"{manifest.get('reduction', '?')} kernel, {manifest.get('mode', '?')} mode"
    return f"{probes.get('n', '?')} probes{source}, {kind}"


def _watch(manifest: Mapping[str, Any]) -> str:
    """Since when the watch is off, and why, and how many probes failed; empty where nothing went wrong."""
    failed = manifest.get("failed_probes") or []
    said = [switched_off(manifest)]
    if len(failed) == 1:
        said.append(f"One probe failed, at step {failed[0]:,}.")
    elif failed:
        said.append(f"{len(failed)} probes failed, the first at step {failed[0]:,}, the last at step {failed[-1]:,}.")
    return " ".join(filter(None, said))


def switched_off(manifest: Mapping[str, Any]) -> str:
    """Since when the watch is off, and why; empty where it is on."""
    if not (off := manifest.get("switched_off") or {}):
        return ""
    why = " ".join(str(off.get("why")).split())  # torch's errors are of several lines
    return f"Switched off at step {off.get('step', 0):,}; nothing was measured after it: {why}."


def _span(metrics: pd.DataFrame) -> str:
    if len(metrics) == 1:
        return f"Measured once, at step {metrics.index[0]:,}"
    return f"Measured {len(metrics)} times, steps {metrics.index[0]:,} to {metrics.index[-1]:,}"

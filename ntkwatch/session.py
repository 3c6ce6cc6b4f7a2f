"""Session: one run being watched. Monitor → record and sinks, and what a checkpoint must carry. No Lightning here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkwatch.baseline import Baseline
from ntkwatch.diagnostics import DIAGNOSTICS, costs, needs_limit
from ntkwatch.engines.tangent import warm_up
from ntkwatch.limit import NO_LIMIT, WideLimit
from ntkwatch.model import leaves, map_leaves
from ntkwatch.monitor import Monitor
from ntkwatch.probes import ProbeSet
from ntkwatch.record import Measurement, RecordError, RecordWriter, Run, load_run, load_tensors, save_tensors
from ntkwatch.sinks import Sinks

STATE_LIMIT = 512 * 1024  # bytes: a larger kernel stays out of the user's checkpoints
SLOW_PROBE = 30.0  # seconds: what takes longer is said before it begins
BASELINE_FILE = "baseline"
PROBES_FILE = "probes"
LONGEST_WHY = 1000  # characters of a failure's sentence: a compiler's error is as long as its source


class Session:
    """A monitor, the record it writes and the sinks it feeds.

    Args:
        monitor: measures.
        folder: where the record goes; None writes nothing.
        sinks: loggers and dashboards.
        warn: told, in one sentence, what could not be written.
        save_kernels: keep every kernel in the record, not only the baseline's.
        save_probes: kept beside the record, where they cannot be found again: those of a stream, as they came.
        fresh: step -> ProbeSet, for resampled probes; None measures the monitor's own.
        extra: added to the manifest (optimizer, schedule, …).
    """

    def __init__(
        self,
        monitor: Monitor,
        folder: Path | None,
        sinks: Sinks,
        *,
        warn: Callable[[str], None] = warnings.warn,
        save_kernels: bool = True,
        save_probes: ProbeSet | None = None,
        fresh: Callable[[int], ProbeSet] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.monitor, self.folder, self.sinks = monitor, folder, sinks
        self.last: Measurement | None = None
        self._warn = warn
        self._save_kernels, self._save_probes = save_kernels, save_probes
        self._fresh, self._extra = fresh, dict(extra or {})
        self._writer: RecordWriter | None = None
        self._told = False

    @property
    def begun(self) -> bool:
        """Whether there is a baseline to compare with."""
        return self.monitor.baseline is not None

    @property
    def record(self) -> Path | None:
        """Where the record is; None while, or where, there is none."""
        return self.folder if self._writer is not None else None

    def begin(self, batches: Sequence[Any] = ()) -> None:
        """Settle engine and BatchNorm baseline before the first probe; batches: training batches for calibration."""
        warm_up()
        self.monitor.start(batches)
        seconds = self.monitor.foreseen()
        if seconds > SLOW_PROBE:
            self._warn(
                f"one probe of {len(self.monitor.probes)} examples may take some {seconds:.0f} s: pass a smaller "
                "number as probes=, or a larger every="
            )

    def probe(
        self, step: int, overhead: Callable[[], float], last: bool = False, x: int | None = None, **at: Any
    ) -> Measurement:
        """Measure, then write to the record and to every sink.

        overhead: share of wall time, asked after measuring. x: where the run's own metrics stand on the loggers' axis.
        """
        probes = self._fresh(step) if self._fresh is not None and self.begun else None
        first = not self.begun
        measured = self.monitor.measure(step, probes=probes, **at)
        measurement = replace(measured, metrics={**measured.metrics, "overhead": overhead()})
        self._tell_unfrozen()
        if first:
            manifest = {**self.monitor.manifest(), **self._extra}
            self.sinks.start(manifest)
            self._on_disk("the record cannot be written", partial(self._open, manifest))
        self.sinks.write(measurement, labels=(probes or self.monitor.probes).targets, last=last, x=x)
        if self._writer is not None:
            keep = self._save_kernels or first
            self._on_disk(f"step {step} is not in the record", partial(self._writer.append, measurement, keep))
        self.last = measurement
        return measurement

    def tell_unfollowed(self) -> None:
        """At the start: that the linear forecast that was asked for by name is not there, why, and what to do."""
        monitor = self.monitor
        if monitor.follows and isinstance(monitor.forecast, str):
            named = ", ".join(name for name in monitor.diagnostics if "forecast" in DIAGNOSTICS[name].needs)
            self._warn(f"there is no linear forecast, so {named} stay undefined: {monitor.forecast}")

    def _tell_unfrozen(self) -> None:
        unfrozen = self.monitor.network.unfrozen()
        if unfrozen and not self._told:
            self._told = True
            self._warn(
                f"{len(unfrozen)} parameters train now that did not at the first probe ({', '.join(unfrozen[:3])}): "
                "the kernel stays that of the first ones, and the Taylor ratio is undefined from here on"
            )

    def _on_disk(self, otherwise: str, work: Callable[[], None]) -> None:
        """A full or missing disk costs the record, never the loggers or the run."""
        try:
            work()
        except OSError as error:
            self._warn(f"{otherwise} ({type(error).__name__}: {error})")

    def _open(self, manifest: Mapping[str, Any]) -> None:
        baseline = self.monitor.baseline
        if self.folder is None or baseline is None:
            return
        writer = RecordWriter.create(self.folder, manifest)
        sha256 = save_tensors(self.folder, BASELINE_FILE, baseline.tensors())
        writer.update_manifest(theta0={"file": BASELINE_FILE, "sha256": sha256}, baseline_step=baseline.step)
        if self._save_probes is not None:
            named = {f"{i:04d}": leaf for i, leaf in enumerate(_tensors(self._save_probes))}
            writer.update_manifest(probes_sha256=save_tensors(self.folder, PROBES_FILE, named))
        self._writer = writer

    def note(self, step: int, off: str | None) -> None:
        """Say in the record that the probe at this step failed (None), or that the watch was switched off, and why."""
        if self._writer is None:
            return
        entry: dict[str, Any] = {"switched_off": {"step": step, "why": (off or "")[:LONGEST_WHY]}}
        if off is None:
            entry = {"failed_probes": sorted({*self._writer.manifest.get("failed_probes", []), step})}
        self._on_disk("a failure is not in the record", partial(self._writer.update_manifest, **entry))

    def introduction(self) -> list[str]:
        """What a person should know once: probes, engine, BatchNorm's baseline, where the record is."""
        monitor = self.monitor
        extra = costs(monitor.diagnostics, monitor.reduction)
        lines = [
            f"{len(monitor.probes)} probes from {monitor.probes.source}: {monitor.probes.how}",
            f"engine {monitor.choice.reason if monitor.choice else 'not chosen yet'}",
            monitor.calibration,
            f"a probe takes, beyond one kernel: {'; '.join(extra)}" if extra else None,
            str(monitor.limit) if needs_limit(monitor.diagnostics) else None,
            f"record {self.folder}" if self.folder is not None else None,
        ]
        return [line for line in lines if line is not None]

    def finish(self) -> None:
        """Leave everything on disk, and say in the record that the run is over."""
        self.sinks.finish()
        if self._writer is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._on_disk("the end is not in the record", partial(self._writer.update_manifest, finished=now))

    # ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────
    def state(self) -> dict[str, Any]:
        """What a checkpoint carries: tensors and primitives, under 1 MB."""
        if not self.begun or self.record is None:
            return {}
        previous = self.monitor.previous
        small = previous is not None and previous[1].numel() * previous[1].element_size() <= STATE_LIMIT
        return {
            "record": str(self.record),
            "probe_hash": self.monitor.probes.hash,
            "previous_step": previous[0] if previous is not None else None,
            "previous_kernel": previous[1].clone() if previous is not None and small else None,
        }

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Continue the record that the state names, against its own baseline.

        Raises RecordError (with the reason) where record, baseline or probes are not the ones of the state.
        """
        folder = Path(state["record"])
        run = load_run(folder)
        manifest = run.manifest
        if state["probe_hash"] != self.monitor.probes.hash:
            raise RecordError(f"the probes are not those of {folder}: the data, probes= or seed= has changed")
        if manifest["reduction"] != self.monitor.reduction:
            raise RecordError(f"{folder} holds {manifest['reduction']} kernels, reduction= asks for another")
        tensors = load_tensors(folder, manifest["theta0"]["file"], manifest["theta0"]["sha256"])
        baseline = Baseline.from_tensors(manifest["baseline_step"], tensors)
        previous = self._previous(state, folder)
        self._writer = RecordWriter.resume(folder, step)
        failed = [earlier for earlier in manifest.get("failed_probes", []) if earlier <= step]
        self._writer.update_manifest(finished=None, switched_off=None, failed_probes=failed)
        self.monitor.restore(baseline, previous, _travelled(run, previous), _limit(run))
        self.folder = folder
        history = {earlier: run.eigenvalues(earlier) for earlier in run.steps if earlier <= step}
        self.sinks.start({**manifest, **self._extra}, history)

    @staticmethod
    def _previous(state: Mapping[str, Any], folder: Path) -> tuple[int, Tensor] | None:
        step, kernel = state["previous_step"], state["previous_kernel"]
        if step is None:
            return None
        if kernel is None:
            kernel = load_run(folder).kernel(step)
        return int(step), torch.as_tensor(kernel)


def _travelled(run: Run, previous: tuple[int, Tensor] | None) -> float | None:
    """Length of the kernel's path up to the previous kernel, where the record has it."""
    if previous is None or "path_length" not in run.metrics or previous[0] not in run.metrics.index:
        return None
    length = float(run.metrics["path_length"].loc[previous[0]])
    return None if length != length else length


def _limit(run: Run) -> WideLimit:
    """The infinite-width limit that the record keeps, or why it has none."""
    try:
        return WideLimit(run.limit)
    except RecordError as error:
        said = str(run.manifest.get("infinite") or "")
        return WideLimit(said.removeprefix(NO_LIMIT) if said.startswith(NO_LIMIT) else str(error))


def _tensors(probes: ProbeSet) -> list[Tensor]:
    return [leaf for leaf in leaves(probes.batch) if isinstance(leaf, Tensor)]


def stored_probes(state: Mapping[str, Any], like: ProbeSet, targets: Any = None) -> ProbeSet:
    """The probes that the state's record keeps, in the form of `like`; `like` itself where it keeps none."""
    folder = Path(state["record"])
    try:
        sha256 = load_run(folder).manifest.get("probes_sha256")
        stored = load_tensors(folder, PROBES_FILE, sha256) if sha256 else {}
    except RecordError:
        return like
    if len(stored) != len(_tensors(like)):
        return like
    in_order = iter([stored[name] for name in sorted(stored)])
    batch = map_leaves(lambda leaf: next(in_order) if isinstance(leaf, Tensor) else leaf, like.batch)
    return ProbeSet.from_batch(batch, targets=targets, source=like.source, how=like.how)

"""Session: one run being watched. Monitor → record and loggers, and what a checkpoint must carry. No Lightning here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ntkwatch.diagnostics import DIAGNOSTICS, costs, needs_limit
from ntkwatch.engines.tangent import warm_up
from ntkwatch.loggers.group import LoggerGroup
from ntkwatch.measurement.monitor import Monitor
from ntkwatch.model import leaves, map_leaves
from ntkwatch.probes import ProbeSet
from ntkwatch.record import (
    MANIFEST,
    Measurement,
    Owner,
    RecordError,
    RecordWriter,
    acquire_free,
    load_run,
    load_tensors,
    save_tensors,
)
from ntkwatch.watching.resume import BASELINE_FILE, PROBES_FILE, Earlier

STATE_LIMIT = 512 * 1024  # bytes: a larger kernel stays out of the user's checkpoints
SLOW_PROBE = 30.0  # seconds: what takes longer is said before it begins
LONGEST_WHY = 1000  # characters of a failure's sentence: a compiler's error is as long as its source


class Session:
    """A monitor, the record it writes and the loggers it feeds.

    Args:
        monitor: measures.
        folder: where the record goes, if no other is there; None writes nothing.
        is_log: whether that folder was named, by a logger or by the user; no run shares it with another log.
        loggers: those that the run writes to.
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
        loggers: LoggerGroup,
        *,
        is_log: bool = False,
        warn: Callable[[str], None] = warnings.warn,
        save_kernels: bool = True,
        save_probes: ProbeSet | None = None,
        fresh: Callable[[int], ProbeSet] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.monitor, self.folder, self.loggers = monitor, folder, loggers
        self._is_log = is_log
        self.last: Measurement | None = None
        self.foreseen = 0.0  # seconds that a kernel of the probes may take
        self._warn = warn
        self._save_kernels, self._save_probes = save_kernels, save_probes
        self._fresh, self._extra = fresh, dict(extra or {})
        self._writer: RecordWriter | None = None
        self._owner: Owner | None = None
        self._anew: str | None = None  # why an earlier record is not continued
        self._branched: str | None = None
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
        self.foreseen = seconds = self.monitor.foreseen()
        if seconds > SLOW_PROBE:
            self._warn(
                f"one probe of {len(self.monitor.probes)} examples may take some {seconds:.0f} s: pass a smaller "
                "number as probes=, or a larger every="
            )

    def probe(self, step: int, last: bool = False, x: int | None = None, **at: Any) -> Measurement:
        """Measure, then write to the record and to every logger.

        x: where the run's own metrics stand on the loggers' axis.
        """
        probes = self.monitor.read(self._fresh(step)) if self._fresh is not None and self.begun else None
        first = not self.begun
        measurement = self.monitor.measure(step, probes=probes, **at)
        self._tell_unfrozen()
        if first:
            manifest = {**self.monitor.manifest(), **self._extra}
            self.loggers.start(manifest)
            self._on_disk("the record cannot be written", partial(self._open, manifest, step))
        self.loggers.write(measurement, labels=(probes or self.monitor.probes).targets, last=last, x=x)
        if self._writer is not None:
            keep = self._save_kernels or first
            self._recorded(f"step {step} is not in the record", partial(self._writer.append, measurement, keep))
        self.last = measurement
        return measurement

    def warn_of_missing_forecast(self) -> None:
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

    def _recorded(self, otherwise: str, work: Callable[[], None]) -> None:
        """As `_on_disk`, where the record is still this run's."""
        if self._owner is not None and not self._owner.holds():
            self._warn(f"another run has taken over {self.folder}: this one is not recorded from here on")
            self._writer = self._owner = None
            return
        self._on_disk(otherwise, work)

    def _open(self, manifest: Mapping[str, Any], step: int) -> None:
        """A record of this run's own: what later probes are compared with first, and the manifest last."""
        baseline, wanted = self.monitor.baseline, self.folder
        if wanted is None or baseline is None:
            return
        self._owner = acquire_free(wanted)
        self.folder = folder = self._owner.folder
        sha256 = save_tensors(folder, BASELINE_FILE, baseline.tensors())
        side: dict[str, Any] = {"theta0": {"file": BASELINE_FILE, "sha256": sha256}, "baseline_step": baseline.step}
        if self._save_probes is not None:
            named = {f"{i:04d}": leaf for i, leaf in enumerate(_tensors(self._save_probes))}
            side["probes_sha256"] = save_tensors(folder, PROBES_FILE, named)
        self._writer = RecordWriter.create(folder, {**manifest, **side})
        if self._anew is not None or (self._is_log and folder != wanted):
            why = self._anew or f"{wanted} holds the record of another run or belongs to one"
            self._warn(f"{why}; a new one starts at step {step}, with a baseline of its own, in {folder}")

    def _let_go(self) -> None:
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    def renew(self) -> None:
        """The run goes on, and the record is still its own; call it at every batch."""
        if self._owner is not None:
            self._owner.renew()

    def note(self, step: int, off: str | None) -> None:
        """Say in the record that the probe at this step failed (None), or that the watch was switched off, and why."""
        if self._writer is None:
            return
        entry: dict[str, Any] = {"switched_off": {"step": step, "why": (off or "")[:LONGEST_WHY]}}
        if off is None:
            entry = {"failed_probes": sorted({*self._writer.manifest.get("failed_probes", []), step})}
        self._recorded("a failure is not in the record", partial(self._writer.update_manifest, **entry))

    def introduction(self) -> list[str]:
        """What a person should know once: probes, engine, BatchNorm's baseline, where the record is."""
        monitor = self.monitor
        extra = costs(monitor.diagnostics, monitor.reduction)
        lines = [
            f"{len(monitor.probes)} probes from {monitor.probes.source}: {monitor.probes.how}",
            monitor.taken,
            f"engine {monitor.choice.reason if monitor.choice else 'not chosen yet'}",
            monitor.calibration,
            f"a probe takes, beyond one kernel: {'; '.join(extra)}" if extra else None,
            str(monitor.limit) if needs_limit(monitor.diagnostics) else None,
            f"record {self.folder}" if self._is_free() else None,
            f"the record begins with another's, since {self._branched}" if self._branched else None,
        ]
        return [line for line in lines if line is not None]

    def _is_free(self) -> bool:
        """Whether the record is, or will be, in `folder` itself; where another is there, a warning will say."""
        return self.folder is not None and (self._writer is not None or not (self.folder / MANIFEST).exists())

    def finish(self, completed: bool = False) -> None:
        """Leave everything on disk, and say in the record that the run is over; completed: that it came to its end."""
        self.loggers.finish()
        if self._writer is not None:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            over = partial(self._writer.update_manifest, finished=now, completed=completed)
            self._recorded("the end is not in the record", over)
        self._let_go()

    # ── resume ────────────────────────────────────────────────────────────────────────────────────────────────────
    def state(self) -> dict[str, Any]:
        """What a checkpoint carries: tensors and primitives, under 1 MB."""
        if not self.begun or self.record is None:
            return {}
        previous = self.monitor.previous
        small = previous is not None and previous[1].numel() * previous[1].element_size() <= STATE_LIMIT
        return {
            "record": os.path.abspath(self.record),
            "id": self._writer.manifest.get("id") if self._writer is not None else None,
            "probe_hash": self.monitor.probes.hash,
            "previous_step": previous[0] if previous is not None else None,
            "previous_kernel": previous[1].clone() if previous is not None and small else None,
        }

    def continue_record(self, restored: Mapping[str, Any] | None, why_not: str | None) -> bool:
        """Whether the run goes on from `restored`, a callback's state; if not, the warning that names the new record
        says why: `why_not`, where there is nothing to go on from."""
        try:
            if restored is not None:
                self.resume(restored["session"], restored["step"])
                return True
        except (RecordError, OSError) as error:
            why_not = f"the earlier record cannot be continued ({str(error).rstrip('.')})"
            self._writer = None
            self._let_go()
        self._anew = why_not
        return False

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Continue the record that the state names, or a branch of it, against its own baseline.

        Raises RecordError (with the reason) where record, baseline or probes are not the ones of the state, OSError
        where a branch cannot be written.
        """
        earlier = Earlier.read(state, step, self.monitor)
        run = earlier.run
        history = {at: run.eigenvalues(at) for at in run.steps if at <= step}  # before anything is written or restored
        if self.folder is not None:
            changes = {"hparams": self.monitor.hparams, **self._extra}
            self._owner, self._writer, self._branched = earlier.go_on(self.folder, self._is_log, changes)
            self.folder = self._owner.folder
            if self._branched and not (self._is_log and self.folder.parent != earlier.run.folder.parent):
                self._warn(f"{self._branched}: this run goes on from step {step} in a record of its own, {self.folder}")
        self.monitor.restore(earlier.baseline, earlier.previous, earlier.travelled, earlier.limit)
        self.loggers.start({**run.manifest, **self._extra}, history)


def _tensors(probes: ProbeSet) -> list[Tensor]:
    return [leaf for leaf in leaves(probes.batch) if isinstance(leaf, Tensor)]


def keeps_probes(state: Mapping[str, Any]) -> bool:
    """Whether the state's record says that it keeps its probes: those of a stream, which cannot be found again."""
    try:
        return "probes_sha256" in load_run(Path(state["record"])).manifest
    except RecordError:
        return False


def stored_probes(state: Mapping[str, Any], like: ProbeSet, targets: Any = None) -> ProbeSet | None:
    """The probes that the state's record keeps, in the form of `like`; None where it keeps none."""
    folder = Path(state["record"])
    try:
        sha256 = load_run(folder).manifest.get("probes_sha256")
        stored = load_tensors(folder, PROBES_FILE, sha256) if sha256 else {}
    except RecordError:
        return None
    if len(stored) != len(_tensors(like)):
        return None
    in_order = iter([stored[name] for name in sorted(stored)])
    batch = map_leaves(lambda leaf: next(in_order) if isinstance(leaf, Tensor) else leaf, like.batch)
    how = f"the rows of the {like.source} stream that the record keeps"
    return ProbeSet.from_batch(batch, targets=targets, source=like.source, how=how)

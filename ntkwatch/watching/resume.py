"""Going on with a record: the checkpoint's own where nobody else may own it, else a branch of it in another folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkwatch.measurement.baseline import Baseline
from ntkwatch.measurement.infinite_limit import NO_LIMIT, WideLimit
from ntkwatch.measurement.monitor import Monitor
from ntkwatch.model import Network
from ntkwatch.record import (
    FORECASTS,
    Owner,
    RecordError,
    RecordInUse,
    RecordWriter,
    Run,
    acquire,
    acquire_free,
    branch,
    load_run,
    load_tensors,
    safe_name,
)

BASELINE_FILE = "baseline"
PROBES_FILE = "probes"


@dataclass(frozen=True)
class Earlier:
    """The record of a checkpoint, checked against the run that goes on: what its next probe is compared with."""

    run: Run
    baseline: Baseline
    previous: tuple[int, Tensor] | None
    state: Mapping[str, Any]
    step: int

    @classmethod
    def read(cls, state: Mapping[str, Any], step: int, monitor: Monitor) -> Earlier:
        """RecordError, with the reason, where record, baseline or probes are not the ones of the state."""
        folder = Path(state["record"])
        run = load_run(folder)
        if run.folder != folder or state.get("id") not in (None, run.manifest.get("id")):
            raise RecordError(f"{folder} holds the record of another run now")
        if state["probe_hash"] != monitor.probes.hash:
            raise RecordError(f"the probes are not those of {folder}: the data, probes= or seed= has changed")
        if run.manifest.get("reduction") != monitor.reduction:
            raise RecordError(f"{folder} holds {run.manifest.get('reduction')} kernels, reduction= asks for another")
        baseline = _baseline(run, monitor.network)
        return cls(run, baseline, _previous(state, run, baseline), state, step)

    @property
    def travelled(self) -> float | None:
        """Length of the kernel's path up to the previous kernel, where the record has it."""
        metrics = self.run.metrics
        if self.previous is None or "path_length" not in metrics or self.previous[0] not in metrics.index:
            return None
        length = float(metrics["path_length"].loc[self.previous[0]])
        return None if length != length else length

    @property
    def limit(self) -> WideLimit:
        """The infinite-width limit that the record keeps, or why it has none."""
        try:
            return WideLimit(self.run.limit)
        except RecordError as error:
            said = str(self.run.manifest.get("infinite") or "")
            return WideLimit(said.removeprefix(NO_LIMIT) if said.startswith(NO_LIMIT) else str(error))

    def go_on(self, place: Path, is_log: bool, changes: Mapping[str, Any]) -> tuple[Owner, RecordWriter, str | None]:
        """What writes from here on: into the record itself, or into a branch at `place`; and why it is a branch.

        is_log: whether `place` is a logger's folder, which no run shares with another log. changes: to the manifest of
        a branch.
        """
        failed = [step for step in self.run.manifest.get("failed_probes") or [] if step <= self.step]
        again = {"finished": None, "completed": False, "switched_off": None, "failed_probes": failed}
        why = self._why_not_here(place, is_log)
        if why is None:
            try:
                return *_owning(acquire(self.run.folder), lambda folder: self._continued(again)), None
            except RecordInUse as error:
                why = str(error).rstrip(".")
        side = self._side_files()
        parts = (self.run.folder, self.step, {**changes, **again}, side)
        return *_owning(acquire_free(place), lambda folder: branch(folder, *parts)), why

    def _continued(self, again: Mapping[str, Any]) -> RecordWriter:
        writer = RecordWriter.resume(self.run.folder, self.step)
        writer.update_manifest(**again)
        return writer

    def _why_not_here(self, place: Path, is_log: bool) -> str | None:
        """Why the record is left as it is; None where this run may go on in it, if nobody owns it."""
        steps, folder = self.run.steps, self.run.folder
        if is_log and not _is_same_log(folder, place):
            return f"{folder} belongs to another log"
        if self.run.manifest.get("completed") and steps and steps[-1] > self.step:
            return f"the run of {folder} went on to step {steps[-1]} and ended"
        return None

    def _side_files(self) -> list[str]:
        kept = (self.state.get("forecast") or {}).get("name")
        names = [
            self.run.manifest["theta0"]["file"],
            PROBES_FILE,
            *([f"{FORECASTS}/{safe_name(kept)}"] if kept else []),
        ]
        return [name for name in names if (self.run.folder / f"{name}.safetensors").exists()]


def _owning(owner: Owner, write: Callable[[Path], RecordWriter]) -> tuple[Owner, RecordWriter]:
    """The owner of a folder and what writes there; where that cannot be made, nobody owns it any longer."""
    try:
        return owner, write(owner.folder)
    except BaseException:
        owner.release()
        raise


def _is_same_log(record: Path, place: Path) -> bool:
    """Whether a record lies where this run's would: under its name, or that name and a number."""
    if os.path.realpath(record.parent) != os.path.realpath(place.parent):
        return False
    return re.fullmatch(re.escape(place.name) + r"(-\d+)?", record.name) is not None


def _baseline(run: Run, network: Network) -> Baseline:
    manifest, folder = run.manifest, run.folder
    if not manifest.get("theta0") or manifest.get("baseline_step") is None:
        raise RecordError(f"{folder} holds no baseline: its run was stopped while it was writing it")
    tensors = load_tensors(folder, manifest["theta0"]["file"], manifest["theta0"]["sha256"])
    if "kernel" not in tensors:
        raise RecordError(f"{folder} holds no baseline kernel")
    baseline = Baseline.from_tensors(manifest["baseline_step"], tensors)
    now = {name: tuple(p.shape) for name, p in network.parameters.items()}
    then = {name: tuple(p.shape) for name, p in (baseline.parameters or {}).items()} or dict.fromkeys(
        manifest.get("parameters") or now
    )
    if set(then) != set(now) or (baseline.parameters is not None and then != now):
        other = sorted(set(then) ^ set(now)) or [name for name in now if then[name] != now[name]]
        raise RecordError(f"the trained parameters are not those of {folder} ({other[0]}, …)")
    return baseline


def _previous(state: Mapping[str, Any], run: Run, baseline: Baseline) -> tuple[int, Tensor] | None:
    step, kernel = state["previous_step"], state["previous_kernel"]
    if step is None:
        return None
    kernel = run.kernel(step) if kernel is None else torch.as_tensor(kernel)
    if kernel.shape != baseline.kernel.shape:
        raise RecordError(f"the checkpoint's kernel is not one of {run.folder}: it has the shape {list(kernel.shape)}")
    return int(step), kernel

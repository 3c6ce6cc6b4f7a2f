"""Promise 6: a failing logger or disk never stops training, nor changes it; what works goes on being written.

Each outlet of NTKWatch × {OSError, ENOSPC, NaN, timeout} × {from its first call, in mid-run}. NaN is a measurement full
of it, handed to the outlet; the others are raised by the outlet whenever it is given something of NTKWatch's.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch

from tests.support.trust_configs import Job, task
from tests.support.trust_harness import Observation, Tally, observe

FAULTS: dict[str, Exception | None] = {
    "OSError": OSError(errno.EIO, "Input/output error"),
    "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
    "NaN": None,
    "timeout": TimeoutError("the server did not answer"),
}
MOMENTS = {"from the start": 0, "in mid-run": 3}
CALLS = (
    "log_metrics",
    "log_image",
    "add_scalar",
    "add_scalars",
    "add_histogram",
    "add_image",
    "add_figure",
    "add_text",
)
SETUP = ("add_custom_scalars", "define_metric")


class Plain(pl.loggers.logger.Logger):
    """Any logger: it knows log_metrics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name, version = "plain", "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **named: Any) -> None:
        """Not kept."""


OUTLETS: dict[str, Callable[[Path], Any]] = {
    "TensorBoard": lambda folder: pl.loggers.TensorBoardLogger(folder),
    "CSV": lambda folder: pl.loggers.CSVLogger(folder),
    "any logger": lambda folder: Plain(),
    "W&B": lambda folder: pl.loggers.WandbLogger(save_dir=folder, offline=True),
    "the record": lambda folder: pl.loggers.CSVLogger(folder),
}


class Breaking:
    """A method that raises `fault` for what NTKWatch gives it, from call `after` on; the user's own goes through."""

    def __init__(self, method: Any, fault: Exception, after: int) -> None:
        self.method, self.fault, self.after = method, fault, after
        self.raised = 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        what = args[0] if args else named
        ours = any(str(name).startswith("ntk") for name in (what if isinstance(what, dict) else [what]))
        if ours or self.method.__name__ in SETUP:
            self.after -= 1
            if self.after < 0:
                self.raised += 1
                raise self.fault
        return self.method(*args, **named)


def break_logger(logger: Any, fault: Exception, after: int) -> list[Breaking]:
    """Replace the methods of a logger and of its writer by breaking ones."""
    broken = []
    for owner in (logger, getattr(logger, "experiment", None)):
        for name in (*CALLS, *(SETUP if after == 0 else ())):
            if callable(method := getattr(owner, name, None)):
                broken.append(Breaking(method, fault, after))
                setattr(owner, name, broken[-1])
    return broken


class BreakAtStart(pl.Callback):
    """Breaks the run's logger once it is set up, before NTKWatch (which stands after) first uses it."""

    def __init__(self, fault: Exception, after: int) -> None:
        self.fault, self.after = fault, after
        self.broken: list[Breaking] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.broken = break_logger(trainer.logger, self.fault, self.after)


@contextlib.contextmanager
def broken_record(fault: Exception, after: int) -> Iterator[list[Breaking]]:
    from ntkwatch.record import RecordWriter

    calls = itertools.count()
    append, broken = RecordWriter.append, [Breaking(RecordWriter.append, fault, after)]

    def breaking(self: Any, *args: Any, **named: Any) -> None:
        if next(calls) >= after:
            broken[0].raised += 1
            raise fault
        append(self, *args, **named)

    with mock.patch.object(RecordWriter, "append", breaking):
        yield broken


@contextlib.contextmanager
def nan_measurements(after: int) -> Iterator[list[Any]]:
    """Monitor.measure gives NaN instead of every number, from the call after the `after`-th on."""
    from ntkwatch.measurement.monitor import Monitor

    measure, spoiled = Monitor.measure, []
    calls = itertools.count()

    def spoilt(self: Any, *args: Any, **named: Any) -> Any:
        m = measure(self, *args, **named)
        if next(calls) < after:
            return m
        nan = {name: torch.full_like(getattr(m, name), torch.nan) for name in ("kernel", "eigenvalues", "outputs")}
        layers = {name: torch.full_like(k, torch.nan) for name, k in m.layers.items()}
        spoiled.append(replace(m, metrics=dict.fromkeys(m.metrics, float("nan")), layers=layers, **nan))
        return spoiled[-1]

    with mock.patch.object(Monitor, "measure", spoilt):
        yield spoiled


class LoggingTask:
    """Builds the plain task with a value of the user's own logged at each step."""

    def __call__(self, import_name: str) -> Any:
        module = task()(import_name)
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Any:
            loss = step(batch, batch_idx)
            module.log("train_loss", loss)
            return loss

        module.training_step = training_step
        return module


def train(outlet: str, folder: Path, watch: Callable[[], list[Any]]) -> Observation:
    logger = OUTLETS[outlet](folder)
    arguments = {"logger": logger, "log_every_n_steps": 1, "default_root_dir": folder}
    seen = observe(Job(outlet, LoggingTask(), arguments), watch=watch)
    if outlet == "W&B":
        logger.experiment.finish()
    return seen


def watched(outlet: str, fault: str, after: int, folder: Path) -> tuple[Observation, int, Any]:
    """The run under NTKWatch with the outlet broken; how often it broke, and the callback."""
    from ntkwatch import NTKWatch

    callback = NTKWatch(probes=5, every=1, budget=None)
    error = FAULTS[fault]
    with contextlib.ExitStack() as stack:
        if error is None:
            spoiled = stack.enter_context(nan_measurements(after))
            return train(outlet, folder, lambda: [callback]), len(spoiled), callback
        if outlet == "the record":
            broken = stack.enter_context(broken_record(error, after))
            return train(outlet, folder, lambda: [callback]), broken[0].raised, callback
        breaking = BreakAtStart(error, after)
        seen = train(outlet, folder, lambda: [breaking, callback])
        return seen, sum(b.raised for b in breaking.broken), callback


def sweep(outlets: list[str], tmp_path: Path) -> Tally:
    tally, count = Tally(), itertools.count()
    for outlet in outlets:
        unwatched = train(outlet, tmp_path / outlet, list)
        for fault, (moment, after) in itertools.product(FAULTS, MOMENTS.items()):
            name = f"{outlet} × {fault} {moment}"
            seen, fired, callback = watched(outlet, fault, after, tmp_path / f"{next(count)}")
            tally.compare(name, unwatched, seen)
            kept = written(callback) if outlet != "the record" and fault != "NaN" else 1
            spoken = fault == "NaN" or any("ntkwatch" in said.lower() or "could not" in said for said in seen.warnings)
            good = fired > 0 and kept > 0 and spoken
            tally.recorded += good
            tally.unrecorded += [] if good else [f"{name}: fired {fired}, record {kept} steps, said {seen.warnings}"]
    return tally


def written(callback: Any) -> int:
    """Steps in the record: a broken logger is no reason to lose it."""
    from ntkwatch import load_run

    return 0 if callback.record is None else len(load_run(callback.record).steps) - 12


def run(outlets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(outlets, tmp_path)
    with capsys.disabled():
        print(f"\npromise 6: {tally.cells} failing outlets, {tally.recorded} met, {len(tally.differ)} runs changed")
    assert tally.faults() == ""
    assert tally.recorded == tally.cells == 8 * len(outlets)


def test_failing_outlets_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["TensorBoard", "the record"], tmp_path, capsys)


@pytest.mark.soak
def test_every_failing_outlet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(list(OUTLETS), tmp_path, capsys)

"""Promises 8 and 9: a resumed run's record equals an uninterrupted one's, be the run cut off, forked or killed.

Every epoch is one full-batch step with its own seed, so that training itself resumes bitwise; each step is probed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.support import SUPPORT
from tests.support.trust_configs import QUIET, Augmented, PytorchLightningTask
from tests.support.trust_harness import quieten, seed_all
from tests.support.trust_observe import digest

EPOCHS = 22
IGNORED = {"overhead"}  # wall time


class Crash(BaseException):
    """As sudden as a signal: nothing that expects an Exception may hold it up."""


class Course(pl.Callback):
    """Seeds each step, saves after every `stride`-th (`each`: in a file of its own), crashes after `crash_at`."""

    def __init__(self, folder: Path, stride: int, crash_at: int | None, each: bool = False) -> None:
        self.folder, self.stride, self.crash_at, self.each = folder, stride, crash_at, each

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        seed_all(100 + trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == self.crash_at:
            raise Crash

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if (trainer.current_epoch + 1) % self.stride == 0:
            name = f"{trainer.global_step}.ckpt" if self.each else "last.ckpt"
            trainer.save_checkpoint(self.folder / name)


def train(folder: Path, stride: int = 1, crash_at: int | None = None, resample: bool = False) -> tuple[Any, str]:
    """NTKWatch after a run (continued from the folder's checkpoint, if there is one), and a digest of the weights."""
    from ntkwatch import NTKWatch

    quieten()
    seed_all(5)
    watch = NTKWatch(probes=6, every=1, budget=None, on_error="raise", resample=resample)
    module = PytorchLightningTask()
    arguments = {**QUIET, "max_epochs": EPOCHS, "default_root_dir": folder}
    trainer = pl.Trainer(**arguments, callbacks=[watch, Course(folder, stride, crash_at)])
    saved = folder / "last.ckpt"
    try:
        loaders = DataLoader(Augmented(12, 1, noise=0), 12), DataLoader(Augmented(8, 2, noise=0), 8)
        trainer.fit(module, *loaders, ckpt_path=saved if saved.exists() else None)
    except Crash:
        pass
    return watch, digest(module.state_dict())


def contents(record: Path) -> dict[int, dict[str, Any]]:
    """All that a record says of each step, but for wall time."""
    from ntkwatch import load_run

    run = load_run(record)
    return {step: _step(run, step) for step in run.steps}


def _step(run: Any, step: int) -> dict[str, Any]:
    metrics = {name: repr(value) for name, value in run.metrics.loc[step].items() if name not in IGNORED}
    tensors: dict[str, Tensor] = {"kernel": run.kernel(step), "eigenvalues": run.eigenvalues(step), **run.layers(step)}
    return metrics | {f"tensor {name}": digest(tensor) for name, tensor in tensors.items()}


def interrupted(folder: Path, stride: int, crash_at: int, resample: bool = False) -> tuple[Path, str]:
    """Crash once, resume, finish; the record and the weights' digest."""
    first, _ = train(folder, stride, crash_at, resample)
    assert (folder / "last.ckpt").exists(), f"nothing was saved before step {crash_at}"
    torch.load(folder / "last.ckpt", weights_only=True)
    second, weights = train(folder, stride, resample=resample)
    assert second.record == first.record, "the resumed run must continue the record of the first"
    return second.record, weights


def compare(points: list[tuple[int, int]], tmp_path: Path, resample: bool = False) -> int:
    """How many (stride, crash step) give the uninterrupted record; an assertion names the first that does not."""
    whole, weights = train(tmp_path / "whole", resample=resample)
    expected = contents(whole.record)
    assert sorted(expected) == list(range(EPOCHS + 1)), "every step is probed"
    for stride, crash_at in points:
        name = f"saved every {stride}, crash at step {crash_at}"
        record, resumed = interrupted(tmp_path / f"{stride}-{crash_at}", stride, crash_at, resample)
        assert resumed == weights, f"{name}: the training itself did not resume bitwise"
        found = contents(record)
        assert sorted(found) == sorted(expected), name
        for step in expected:
            differing = [key for key in expected[step] if expected[step][key] != found[step].get(key)]
            assert differing == [], f"{name}: step {step} differs in {differing}"
    return len(points)


def test_a_few_crash_points(tmp_path: Path) -> None:
    assert compare([(1, 2), (3, 8), (5, 22)], tmp_path) == 3


def test_resampled_probes_are_the_same_after_a_resume(tmp_path: Path) -> None:
    assert compare([(3, 8)], tmp_path, resample=True) == 1


# ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def fit(log: Path, *callbacks: Any, checkpoint: Path | None = None) -> Any:
    """The NTKWatch of a training to the end, in a log of its own."""
    from ntkwatch import NTKWatch

    quieten()
    seed_all(5)
    watch = NTKWatch(probes=6, every=1, budget=None, on_error="raise")
    logger = pl.loggers.CSVLogger(log, name="", version=0)
    arguments = {**QUIET, "max_epochs": EPOCHS, "default_root_dir": log, "logger": logger}
    loaders = DataLoader(Augmented(12, 1, noise=0), 12), DataLoader(Augmented(8, 2, noise=0), 8)
    trainer = pl.Trainer(**arguments, callbacks=[watch, *callbacks])
    trainer.fit(PytorchLightningTask(), *loaders, ckpt_path=checkpoint)
    return watch


def fork(points: Sequence[int], root: Path) -> int:
    """How many forks, of one run's checkpoints at these steps, have the uninterrupted record, each in its own log."""
    whole = fit(root / "whole", Course(root, 1, None, each=True)).record
    expected, before = contents(whole), {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for step in points:
        watch = fit(root / f"fork {step}", Course(root / "x", EPOCHS + 1, None), checkpoint=root / f"{step}.ckpt")
        assert watch.record.is_relative_to(root / f"fork {step}"), f"fork at {step}"
        found = contents(watch.record)
        assert sorted(found) == sorted(expected), f"fork at {step}"
        differing = [at for at in expected if found[at] != expected[at]]
        assert differing == [], f"fork at {step}: other numbers at steps {differing}"
        assert before == {path: path.read_bytes() for path in before}, f"fork at {step} wrote into the first record"
    return len(points)


def test_a_few_forks(tmp_path: Path) -> None:
    assert fork([1, 9, 21], tmp_path) == 3


@pytest.mark.soak
def test_20_forks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    equal = fork(range(1, 21), tmp_path)
    with capsys.disabled():
        print(f"\npromise 8: {equal} forks, {equal} records equal the uninterrupted one, 0 shortened")


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def kills(number: int, root: Path) -> str:
    """Kill trainings at random times until there were so many kills; what the test prints."""
    command = [sys.executable, str(SUPPORT / "killed_runs.py"), str(root), str(number), "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(not row["ended"] for row in rows) == number
    for i, row in enumerate(rows):
        held = row["held"]
        assert held is None or held == list(range(len(held))), f"attempt {i}: the record is torn: {held}"
        assert row["told"] is None or held[-1] >= row["told"], f"attempt {i} lost what was recorded: {row}"
        assert row.get("equal", True), f"attempt {i}: the record of the resumed run is not the uninterrupted one's"
    ended = sum(row["ended"] for row in rows)
    assert ended >= 1
    return (
        f"{number} kills, 0 torn, 0 lost; {ended} runs came to their end, {ended} records equal the uninterrupted one"
    )


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="forks are killed")
def test_a_few_kills(tmp_path: Path) -> None:
    kills(4, tmp_path)


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "waitid"), reason="forks are killed")
def test_20_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = kills(20, tmp_path)
    with capsys.disabled():
        print(f"\npromise 9: {said}")


@pytest.mark.soak
def test_a_crash_at_each_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [(1 + step % 3 if step > 3 else 1, step) for step in range(2, 22)]
    equal = compare(points, tmp_path)
    with capsys.disabled():
        print(f"\npromise 8: {equal} crash points, {equal} resumed records equal the uninterrupted one")
    assert equal == 20

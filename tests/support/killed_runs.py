"""Trainings that are killed at random times and resumed: `python killed_runs.py ROOT KILLS SEED`.

Forks of one warm process train, each step probed and saved; the parent kills each after a random time, reads what the
record holds, and lets the next one resume. Prints a line of JSON a kill, and one a run that came to its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ntkwatch import NTKWatch, RecordError, load_run
from tests.support.trust_configs import QUIET, Augmented, PytorchLightningTask
from tests.support.trust_harness import quieten, seed_all
from tests.trust.test_resume import contents

STEPS = 12


class Course(pl.Callback):
    """Seeds each step, saves after it (whole or not at all), and tells the parent that it is over."""

    def __init__(self, folder: Path, pipe: int) -> None:
        self.folder, self.pipe = folder, pipe

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        seed_all(100 + trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        os.write(self.pipe, bytes([trainer.global_step]))  # the watch comes before us: it has recorded the step

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.folder / "next.ckpt")
        os.replace(self.folder / "next.ckpt", self.folder / "last.ckpt")


def train(folder: Path, pipe: int) -> None:
    """From the folder's checkpoint, if there is one, to the end."""
    quieten()
    seed_all(5)
    watch = NTKWatch(probes=6, every=1, budget=None, on_error="raise")
    logger = pl.loggers.CSVLogger(folder, name="", version=0)
    arguments = {**QUIET, "max_epochs": STEPS, "default_root_dir": folder, "logger": logger}
    trainer = pl.Trainer(**arguments, callbacks=[watch, Course(folder, pipe)])
    saved = folder / "last.ckpt"
    loaders = DataLoader(Augmented(12, 1, noise=0), 12), DataLoader(Augmented(8, 2, noise=0), 8)
    trainer.fit(PytorchLightningTask(), *loaders, ckpt_path=saved if saved.exists() else None)


def attempt(folder: Path, delay: float) -> tuple[bool, int | None]:
    """Train in a fork for so many seconds at most: whether it came to its end, and the last step that it told."""
    folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            train(folder, writing)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    until = time.monotonic() + delay
    while time.monotonic() < until and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a run in {folder} failed by itself")
    return os.WIFEXITED(status), told[-1] if told else None


def steps(folder: Path) -> list[int] | None:
    """What the newest record holds; None where there is none yet. RecordError if anything is torn."""
    if not list(folder.glob("version_0/ntkwatch*/manifest.json")):
        return None
    run = load_run(folder / "version_0")
    for step in run.steps[-2:]:
        run.kernel(step)
    return run.steps


def main(root: Path, kills: int, seed: int) -> None:
    delays = random.Random(seed)
    began = time.monotonic()
    assert attempt(root / "whole", 600.0)[0]
    whole, length = contents(root / "whole" / "version_0"), time.monotonic() - began
    number = killed = 0
    while killed < kills or (root / str(number)).exists():
        # Short enough that a run is killed some times before it ends; the last one is let go on to its end.
        ended, told = attempt(root / str(number), delays.uniform(0.1, 0.9) * length if killed < kills else 600.0)
        try:
            held: Any = steps(root / str(number))
        except RecordError as error:
            held = str(error)
        said: dict[str, Any] = {"ended": ended, "told": told, "held": held}
        if ended:
            said["equal"] = contents(root / str(number) / "version_0") == whole
        killed, number = killed + (not ended), number + ended
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Writers in a process of their own, for the tests of what readers see while a run writes, and after it was killed.

`python record_writers.py kill FOLDER KILLS SEED` forks writers of one record and kills each at a random time; a
line of JSON a kill says what it had done. `… write ROOT` writes one record after another, as fast as it can, until it
is killed. Forks of one warm process, since a fresh interpreter takes seconds to import torch.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from ntkwatch.record import Measurement, RecordWriter, load_run

N, LARGE = 6, 96  # a large kernel makes it likely that the kill falls into a snapshot


def measurement(step: int, n: int = N) -> Measurement:
    """Numbers that follow from the step alone, so that a reader can tell right from wrong."""
    kernel = torch.full((n, n), float(step), dtype=torch.float64) + torch.eye(n, dtype=torch.float64)
    metrics: dict[str, float | None] = {"double": 2.0 * step, "third": step / 3, "never": None}
    return Measurement(
        step, metrics, {"never": "it is not defined"}, kernel, {"a.b": kernel}, kernel.diag() * step, 0.1 * step
    )


def write_on(folder: Path, step: int, pipe: int) -> None:
    """Append until killed; each append that has returned is told through the pipe."""
    writer = RecordWriter.resume(folder, step)
    os.write(pipe, step.to_bytes(4, "big"))
    while True:
        step += 1
        writer.append(measurement(step, LARGE if step % 2 else N))
        os.write(pipe, step.to_bytes(4, "big"))


def kill_one(folder: Path, delay: float) -> tuple[int, int]:
    """Fork a writer, kill it after `delay` seconds; the step it resumed from, and the last that it said was written."""
    start = load_run(folder).steps[-1]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_on(folder, start, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read(4)  # it has begun
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told += pipe.read()
    return start, int.from_bytes(told[-4:], "big")


def kill(folder: Path, kills: int, seed: int) -> None:
    """Kill `kills` writers of one record in turn, and read it after each."""
    delays = random.Random(seed)
    RecordWriter.create(folder, {"seed": seed}).append(measurement(0))
    for _ in range(kills):
        _, told = kill_one(folder, delays.uniform(0.0, 0.06))
        run = load_run(folder)  # raises if anything is torn
        wrong = [step for step in run.steps if run.metrics.loc[step, "double"] != 2 * step]
        wrong += [step for step in run.steps[-3:] if run.kernel(step)[0, 0] != step + 1]
        print(
            json.dumps(
                {"told": told, "steps": run.steps == list(range(len(run.steps))), "last": run.steps[-1], "wrong": wrong}
            )
        )


def write(root: Path) -> None:
    """One record after another, 60 steps each, until killed. Not waiting for the disk makes more states a second."""
    os.fsync = lambda handle: None  # type: ignore[assignment]
    for number in itertools.count():
        writer = RecordWriter.create(root / f"version_{number}" / "ntkwatch", {"number": number})
        for step in range(60):
            writer.append(measurement(step))
            writer.update_manifest(written=step)
        if number >= 2:
            shutil.rmtree(root / f"version_{number - 2}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        write(Path(sys.argv[2]))

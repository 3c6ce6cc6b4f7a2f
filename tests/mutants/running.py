"""Tests run in a process of their own against a copy of the package, as it is or with one bug in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.planting import Bug, PlantingError, Source, write

ROOT = Path(__file__).parents[2]
COPIED = ("ntkwatch", "tests", "examples", "docs", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
LIMIT = 300.0  # seconds for the tests of one bug
FAILED = 1  # pytest's exit code where tests ran and some failed


@dataclass(frozen=True)
class Outcome:
    """What became of one bug. caught: by a failing test. said: that test, or why there is none."""

    bug: Bug
    caught: bool
    said: str
    seconds: float


class Workspace:
    """A copy of the repository, first on the path of every process started in it.

    Only Python's own caches tell it from the original: a bug is written into the package and taken out again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, target)
        self.source = Source(folder / "ntkwatch")

    def tests(self, selection: Iterable[str], *flags: str, limit: float = LIMIT) -> tuple[int | None, list[str]]:
        """pytest's exit code, None where it ran past the limit, and the failures, or the last line it printed."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider", *flags]
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        process = subprocess.Popen(
            [*command, *selection], cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, [f"no end within {limit:g} s"]
        finally:
            _end(process)
        lines = [line for line in printed.splitlines() if line.strip()] or [""]
        return process.returncode, [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]

    def run(self, bug: Bug) -> Outcome:
        """The bug's own tests, with the bug."""
        began = time.perf_counter()
        try:
            path, text = self.source.planted(bug)
        except PlantingError as error:
            return Outcome(bug, False, f"no longer applies: {error}", 0.0)
        write(path, text)
        try:
            code, said = self.tests(bug.selection, "-x")
        finally:
            write(path, self.source.texts[path])
        return Outcome(bug, code == FAILED, said[0] if code != 0 else "SURVIVES", time.perf_counter() - began)


def _end(process: subprocess.Popen[str]) -> None:
    """Of tests that were cut off, the processes that they started as well."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

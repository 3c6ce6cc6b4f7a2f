"""Tests run in a process of their own against a copy of the package, as it is or with one bug in it."""

from __future__ import annotations

import os
import shutil
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

    def tests(self, selection: Iterable[str], limit: float = LIMIT) -> tuple[int | None, str]:
        """pytest's exit code, None where it ran past the limit, and the first failure or the last line it printed."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
        paths = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        try:
            done = subprocess.run(
                [*command, *selection], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return None, f"no end within {limit:g} s"
        lines = [line for line in done.stdout.splitlines() if line.strip()] or done.stderr.splitlines() or [""]
        first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
        return done.returncode, first

    def run(self, bug: Bug) -> Outcome:
        """The bug's own tests, with the bug."""
        began = time.perf_counter()
        try:
            path, text = self.source.planted(bug)
        except PlantingError as error:
            return Outcome(bug, False, f"no longer applies: {error}", 0.0)
        write(path, text)
        try:
            code, said = self.tests(bug.selection + (["--device", bug.on] if bug.on != "cpu" else []))
        finally:
            write(path, self.source.texts[path])
        return Outcome(bug, code == FAILED, said if code != 0 else "SURVIVES", time.perf_counter() - began)

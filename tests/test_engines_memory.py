"""Promises 17 and 18: memory is predicted, and a kernel fits into what there is or says that it does not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import memory_models
import pytest
from memory_models import MODELS, REDUCTIONS

HERE = Path(__file__).parent
CELLS = [(name, reduction) for name in MODELS for reduction in REDUCTIONS]
FEW = random.Random(3).sample(CELLS, 6)
RSS = 64 << 20  # what the C library's heap may hold on to beyond the tensors alive at once
MIB = 1 << 20


def row(name: str, reduction: str, found: dict[str, int]) -> str:
    off = found["predicted"] / found["counted"] - 1
    resident = f"{found['resident'] / MIB:9.1f}" if "resident" in found else ""
    sizes = f"{found['predicted'] / MIB:9.1f} {found['counted'] / MIB:9.1f}"
    return f"{name:20s} {reduction:6s} {sizes} {off:+7.1%} {resident}"


def check(rows: dict[tuple[str, str], dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\npromise 17, MiB over the model\nmodel                reduction predicted   counted     off  resident")
        for (name, reduction), found in rows.items():
            print(row(name, reduction, found))
    for (name, reduction), found in rows.items():
        off = abs(found["predicted"] / found["counted"] - 1)
        assert off <= 0.15, f"{name}, {reduction}: predicted {found['predicted']}, was {found['counted']}"


def test_there_are_fifteen_models() -> None:
    assert len(MODELS) >= 15


def test_peak_memory_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    check({cell: memory_models.predicted_and_counted(*cell) for cell in FEW}, capsys)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads resident memory from /proc")
def test_peak_memory_is_predicted_of_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {cell: measured(*cell) for cell in CELLS}
    check(rows, capsys)
    for cell, found in rows.items():
        assert found["resident"] < 1.1 * found["counted"] + RSS, f"{cell}: memory that no tensor holds"


def measured(name: str, reduction: str) -> dict[str, int]:
    """In a process of its own, whose C library gives large blocks back at once."""
    command = [sys.executable, str(HERE / "memory_models.py"), name, reduction]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))

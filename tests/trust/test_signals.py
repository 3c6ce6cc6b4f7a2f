"""Promise 21: a signal in any phase of a probe ends the run as it ends the unwatched one, and finds the model whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import trust_signals
from tests.support.scripts import fault_of
from tests.support.trust_signals import BEFORE, PLACES, SIGNALS

Cells = dict[str, list[dict[str, Any]]]
CELLS = [f"{phase}, {name}" for phase in PLACES for name in SIGNALS]
STARTS = ("choosing probes", "preparing", "self-check", "baseline")
KEPT = {  # by phase, the probes of a run that SIGTERM reaches there
    "a probe": [0], "writing": [0, 2], "logging": [0, 2, 3], "the last probe": [0, 2, 3], BEFORE: [0],
}  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    folder = tmp_path_factory.mktemp("signals")
    fault = fault_of(trust_signals.__file__, folder)
    assert fault is None, fault
    found: Cells = json.loads((folder / "seen.json").read_text())
    assert list(found) == CELLS
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_a_signal_in_a_probe(cell: str, cells: Cells) -> None:
    phase, name = cell.split(", ")
    unwatched, watched = cells[cell]
    assert watched["sent"] == unwatched["sent"] == [name], f"{cell}: the signal was not sent once in each run"
    for what in ("error", "steps", "weights", "random"):
        assert watched[what] == unwatched[what], f"{cell}: {what}"
    assert watched["training"], f"{cell}: the model was left in evaluation mode"
    assert watched["handlers"], f"{cell}: the run's handler is gone"
    if name == "SIGUSR1":
        assert watched["handled"] == {"training": True, "grad": True}, f"{cell}: the handler saw a probe's model"
    else:
        assert watched["late"] == 0, f"{cell}: the probe went on"
    if name == "SIGTERM":
        assert watched["measured"] == KEPT.get(phase, []), cell
    stopped = [f"was not finished: the run was told to stop ({name})"] if phase in STARTS and name != "SIGINT" else []
    assert len(watched["said"]) == len(stopped), f"{cell}: {watched['said']}"
    for said, text in zip(watched["said"], stopped, strict=True):
        assert said.endswith(text), cell


@pytest.mark.soak  # Lightning itself waits half a minute
def test_sigterm_reaches_both_ranks_as_unwatched(tmp_path: Path) -> None:
    """Lightning's handler talks to the other rank, which waits for the probe: it must not run before the probe ends."""
    for run in ("unwatched", "watched"):
        fault = fault_of(trust_signals.__file__, tmp_path, run)
        assert fault is None, fault
    for rank in (0, 1):
        files = [tmp_path / f"{run}{rank}.json" for run in ("unwatched", "watched")]
        unwatched, watched = (json.loads(file.read_text()) for file in files)
        for what in ("error", "steps", "weights"):
            assert watched[what] == unwatched[what], f"rank {rank}: {what}"

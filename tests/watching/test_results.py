"""What a run leaves, for the process that called fit: also where Lightning spawned or forked the run's own."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from ntkwatch import load_run
from ntkwatch.record import Measurement
from ntkwatch.watching.results import SIZE, RunResults
from tests.support import spawned
from tests.support.scripts import fault_of


def test_the_process_that_called_fit_reads_the_record(tmp_path: Path) -> None:
    fault = fault_of(spawned.__file__, tmp_path)
    assert fault is None, fault
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["before"]["record"], seen["before"]["step"]) == ("None", None)
    for name in spawned.FITS:
        run = load_run(tmp_path / name)
        assert seen[name]["record"] == str(run.folder), f"{name}: that fit's own, not an earlier one's"
        assert run.steps == [0, 2, spawned.STEPS]
        assert seen[name]["step"] == spawned.STEPS
        assert seen[name]["angle"] == run.metrics["kernel_angle"].iloc[-1] > 0, name
        assert f"steps 0 to {spawned.STEPS}" in seen[name]["summary"], seen[name]["summary"]
    slim = seen["without kernels"]
    assert slim["record"] == str(load_run(tmp_path / "without kernels").folder)
    assert slim["step"] is None, "the record does not hold the last measurement whole"
    for name in ("a copy", "sent"):
        assert seen[name] == seen["forked"], f"{name} has what its original was told"


def test_a_copy_and_its_original_tell_each_other_nothing(tmp_path: Path) -> None:
    ways = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda one: pickle.loads(pickle.dumps(one))}
    for name, way in ways.items():
        original = RunResults()
        original.keep(tmp_path)
        other = way(original)
        assert other.record == tmp_path, name
        other.keep(tmp_path / "other")
        assert original.record == tmp_path, name
        original.keep(None)
        assert (original.record, other.record) == (None, tmp_path / "other"), name


@pytest.mark.parametrize("case", ["no shared memory", "a path longer than a page"])
def test_what_cannot_be_told_is_still_known_here(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "no shared memory":
        monkeypatch.setattr("multiprocessing.sharedctypes.RawArray", _no_memory)
    outcome, folder = RunResults(), Path("x" * (SIZE if case.startswith("a path") else 9))
    last = Measurement(3, {}, {}, torch.eye(2), {}, torch.ones(2), 0.1)
    outcome.keep(folder, last)
    assert (outcome.record, outcome.last) == (folder, last)


def _no_memory(*_: object) -> None:
    raise OSError("no space left on device")

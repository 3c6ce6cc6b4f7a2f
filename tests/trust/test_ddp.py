"""Promise 3: under DDP on two gloo processes, both ranks train bitwise as without the monitor, and rank 0 records."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import trust_ddp
from tests.support.scripts import fault_of
from tests.support.trust_ddp import DDP_JOBS, LAUNCHERS, NAIVE, UNWATCHED, WATCHERS
from tests.support.trust_harness import Tally
from tests.support.trust_observe import Observation


def seen(folder: Path, rank: int) -> tuple[Observation, dict[str, Any]]:
    written = json.loads((folder / f"rank{rank}.json").read_text())
    fields = {k: written[k] for k in ("final", "violations", "losses", "error")}
    return Observation(moments=[(hook, digests) for hook, digests in written["moments"]], **fields), written


def compare(tally: Tally, name: str, folder: Path, watcher: str) -> None:
    """One run: both ranks against the unwatched ones; counted as recorded where no rank misses anything."""
    merged, ranks = Tally(), []
    for rank in (0, 1):
        before, _ = seen(folder / UNWATCHED, rank)
        after, written = seen(folder / watcher, rank)
        merged.compare(f"{name}, rank {rank}", before, after)
        ranks.append(written)
    tally.cells += 1
    tally.differ += merged.differ[:1]
    missing = [w["missing"] for w in ranks if w["missing"]] + ["not two ranks" for w in ranks if w["world"] != 2]
    tally.recorded += not missing
    tally.unrecorded += [f"{name}: {missing}"] if missing else []


def assert_naive_is_caught(folder: Path) -> None:
    for rank in (0, 1):
        before, after = seen(folder / UNWATCHED, rank)[0], seen(folder / NAIVE, rank)[0]
        assert before.reached_the_weights(after), f"{folder}: on rank {rank} a naive probe went unseen"


def sweep(runs: Sequence[tuple[str, str, Sequence[str]]], folder: Path) -> Tally:
    tally = Tally()
    for i, (launcher, job, watchers) in enumerate(runs):
        failure = fault_of(trust_ddp.__file__, launcher, job, folder / str(i), *watchers, NAIVE)
        for watcher in watchers:
            name = f"{launcher} × {job} × {watcher}"
            if failure is None:
                compare(tally, name, folder / str(i), watcher)
            else:
                tally.cells += 1
                tally.differ.append(f"{name}: {failure}")
    return tally


def run(runs: Sequence[tuple[str, str, Sequence[str]]], folder: Path, capsys: pytest.CaptureFixture[str]) -> Tally:
    tally = sweep(runs, folder)
    with capsys.disabled():
        print("\n" + tally.line("promise 3", "DDP runs on two gloo processes"))
    assert tally.faults() == ""
    assert tally.recorded == tally.cells == sum(len(watchers) for *_, watchers in runs)
    return tally


@pytest.mark.parametrize("every", ["log", 3, [1, 4]], ids=str)
def test_the_callback_can_be_sent_to_a_spawned_process(every: Any) -> None:
    from ntkwatch import NTKWatch

    sent = pickle.loads(pickle.dumps(NTKWatch(every=every, budget=None)))
    due = [
        [step for step in range(12) if watch.schedule.due(step)] for watch in (NTKWatch(every=every, budget=None), sent)
    ]
    assert due[0] == due[1] != []


def assert_ranks_differ(folder: Path) -> None:
    """Were both ranks alike, a monitor that mixed them up would not show."""
    ranks = [seen(folder / UNWATCHED, rank)[0] for rank in (0, 1)]
    batches = [[m["batch and outputs"] for hook, m in rank.moments if hook == "on_train_batch_end"] for rank in ranks]
    assert len(batches[0]) == len(batches[1]) > 0
    assert set(batches[0]).isdisjoint(batches[1]), "the ranks must see different data"
    weights = [{k: v for k, v in r.final.items() if k.startswith("weights/") and "norm" not in k} for r in ranks]
    assert weights[0] == weights[1], "DDP keeps the weights of both ranks equal"


def test_a_sample_of_ddp_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [("ddp", "accumulation 3", WATCHERS[:2]), ("ddp_spawn", "plain", WATCHERS[:1])]
    run([*runs, ("ddp", "stream", WATCHERS[:1])], tmp_path, capsys)
    for i in ("0", "1", "2"):
        assert_ranks_differ(tmp_path / i)
        assert_naive_is_caught(tmp_path / i)


@pytest.mark.soak
def test_every_ddp_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = [(launcher, job.name, WATCHERS) for launcher in LAUNCHERS for job in DDP_JOBS]
    assert run(every, tmp_path, capsys).cells == 40

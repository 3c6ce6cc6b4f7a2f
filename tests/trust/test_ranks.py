"""Promise 7, and the edges of promise 3: whatever a rank meets, both train on as unwatched, and say what they know."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ntkwatch.watching.error_policy import KINDS
from tests.support import trust_ranks
from tests.support.scripts import fault_of
from tests.support.trust_ranks import (
    CELLS,
    COLLECTIVES,
    EVERIES,
    FAILS,
    LEGAL,
    MINDS,
    MISSING,
    PHASES,
    SHARDED,
    SLOW,
    STEPS,
)

LONGEST = 60.0  # seconds of one run: a hang is one of torch's timeouts, 5 minutes and more
SAMPLE = [
    *list(FAILS)[::5], "a probe, rank 0, memory", "the last probe, rank 0, an error", "forward: all_gather",
    "forward: with_gradients", "forward: in_backward", "forward: all_to_all", "forward: own_group", "forward: caught",
    "loss=", *LEGAL, *SLOW, *list(MINDS)[::2], "every: a function that fails on rank 0", *MISSING, *SHARDED,
]  # fmt: skip
ALL = [0, 2, 3, 5]
OFF = "switched off: "
KIND_SAYS = {"an error": r"failed \(Planted: no such thing\)", "memory": r"ran out of memory \(.*can't allocate memory"}
MEASURED = {"a probe": [0, 3, 5], "writing": [0, 3, 5], "logging": [0, 2, 5], "the last probe": [0, 2, 3]}
DEAF_MEASURED = {"self-check": [], "baseline": [0], "a probe": [0, 2], "writing": [0, 2], "logging": [0, 2, 3]}
Seen = dict[str, list[dict[str, Any]]]


def trained(folder: Path, cells: Sequence[str]) -> Seen:
    fault = fault_of(trust_ranks.__file__, folder, *cells)
    assert fault is None, fault
    places = {name: folder / str(list(CELLS).index(name)) for name in cells}
    return {name: [json.loads((p / f"rank{r}.json").read_text()) for r in (0, 1)] for name, p in places.items()}


def assert_unharmed(cell: str, ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        assert seen["same"], f"{cell}: weights or steps of rank {rank} differ from the unwatched run's"
        assert seen["steps"] >= STEPS, f"{cell}: rank {rank} made {seen['steps']} steps"
        assert seen["seconds"] < LONGEST, f"{cell}: rank {rank} waited"


def assert_said(cell: str, rank: dict[str, Any], *patterns: str) -> None:
    """One warning for each pattern, in order, and no other."""
    said = rank["said"]
    assert len(said) == len(patterns), f"{cell}: {said}"
    for one, pattern in zip(said, patterns, strict=True):
        assert re.search(pattern, one), f"{cell}: {pattern!r} is not in {one!r}"


def assert_failure_is_known(cell: str, ranks: list[dict[str, Any]]) -> None:
    phase, where, kind = cell.split(", ")
    first, second = ranks
    if where == "rank 0":
        off = OFF if phase not in MEASURED else ""
        for rank in ranks:
            assert_said(cell, rank, f"{off}{PHASES[phase][2]} {KIND_SAYS[kind]}")
    elif phase == "the last probe":  # they do not meet again
        assert_said(cell, first)
        assert_said(cell, second)
    else:
        assert_said(cell, first, f"{OFF}rank 1 failed, and its log says why")
        assert_said(
            cell, second, f"{OFF}rank 1 could not take what rank 0 sent \\({type(trust_ranks.KINDS[kind]).__name__}"
        )
    expected = MEASURED if where == "rank 0" else DEAF_MEASURED | {"the last probe": ALL}
    assert first["measured"] == expected.get(phase, []), cell


def assert_refused(cell: str, ranks: list[dict[str, Any]]) -> None:
    name = {"outputs=": "all_reduce", "loss=": "all_reduce", "forward: caught": "all_reduce"}.get(cell, cell[9:])
    where = "Reduced.backward" if name == "in_backward" else f"{name}(.<locals>.<lambda>)?"
    for rank in ranks:
        off = rf"{OFF}.* was refused \(CollectiveError: {where} \(trust_ranks_models.py, line \d+\) communicates"
        assert_said(cell, rank, f"{off}.*{re.escape(KINDS['collective'][1])}")
    assert ranks[0]["measured"] == [], cell


def assert_in_time(cell: str, ranks: list[dict[str, Any]]) -> None:
    refused = rf"{OFF}settling the baseline failed \(TooLong: a probe of 6 examples may take some 1000 s, more than"
    for rank, seen in enumerate(ranks):
        if cell == "foreseen":
            assert_said(cell, seen, *(["may take some 1000 s: pass a smaller"] if rank == 0 else []), refused)
        elif cell == "in many operations":
            assert_said(cell, seen, f"{OFF}the look at model and probes failed .TooLong: it has taken 1.6")
        else:
            assert_said(cell, seen, f"{OFF}the ranks do not answer each other .rank {rank} waited to broadcast")


def assert_of_one_mind(cell: str, ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    measured = first["measured"]
    if "random" in cell:
        assert measured[0] == 0, cell
        assert measured[-1] == STEPS, cell
    else:
        assert measured == ([0, 2, 5] if "fails on rank 0" in cell else ALL), cell
    fault = ["every= at step 3 failed .Planted: no such step.; training goes on"] if "fails on rank 0" in cell else []
    for rank in (first, second):
        assert_said(cell, rank, *fault)


def check(seen: Seen) -> None:
    for cell, ranks in seen.items():
        assert_unharmed(cell, ranks)
        if cell in FAILS:
            assert_failure_is_known(cell, ranks)
        elif cell in COLLECTIVES:
            assert_refused(cell, ranks)
        elif cell in SLOW:
            assert_in_time(cell, ranks)
        elif cell in MINDS:
            assert_of_one_mind(cell, ranks)
        elif cell in SHARDED:
            by = "net is managed by FSDPModule" if cell == "FSDP2" else "net.0.weight is a DTensor"
            for rank in ranks:
                assert_said(cell, rank, f"{OFF}{by}; sharded parameters cannot be measured yet: use DDP")
        elif cell in LEGAL:
            assert ranks[0]["measured"] == ALL, f"{cell}: {ranks[0]}"
            assert_said(cell, ranks[0])
        else:
            present = 0 if cell.endswith("1") else 1
            assert_said(cell, ranks[present], f"{OFF}the ranks do not answer each other")
            assert_said(cell, ranks[1 - present])


def test_a_sample_of_cells(tmp_path: Path) -> None:
    check(trained(tmp_path, SAMPLE))


@pytest.mark.soak
def test_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(FAILS) == 32
    check(trained(tmp_path, list(CELLS)))
    with capsys.disabled():
        print(f"\npromise 7: {len(FAILS)} failures by phase and rank, {len(CELLS) - len(FAILS)} more cells, 0 differ")


def test_the_sample_has_every_phase_and_kind() -> None:
    assert {cell.split(", ")[0] for cell in SAMPLE if cell in FAILS} == set(PHASES)
    assert len(EVERIES) == len(MINDS)

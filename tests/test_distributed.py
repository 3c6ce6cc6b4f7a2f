"""Ranks: what they agree on over two real gloo processes, and that nobody hangs where one is missing."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ntkwatch import distributed
from ntkwatch.distributed import Ranks, RanksError, TooLong, sharded
from ntkwatch.watching.error_policy import ErrorPolicy, told
from ntkwatch.watching.rank_zero import run_on_rank_zero

WORLD = 2
WAIT = 3  # seconds for a rank that never comes; for one that does, time enough on a busy machine


# ── alone ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_alone_is_the_identity() -> None:
    ranks = Ranks.detect()
    value = {"a": torch.ones(2), "b": [object()]}
    assert (ranks.rank, ranks.size, ranks.first()) == (0, 1, True)
    assert ranks.agree(True)
    assert not ranks.agree(False)
    assert ranks.failed(False) == (0,)
    assert ranks.broadcast(value) is value, "alone, a value is not even copied"
    joined = ranks.join({"w": value["a"]}, {"w": value["a"]}, ok=False, count=1)
    assert (joined.gradients["w"] is value["a"], joined.failed, joined.count) == (True, (0,), 1)


def test_its_group_has_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's own half hour, a run would stand still."""
    asked: dict[str, Any] = {}

    def new_group(**kwargs: Any) -> None:
        asked.update(kwargs)
        raise RuntimeError("there is no other rank")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "new_group", new_group)
        store = mock.Mock()  # the other rank has come
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
        with pytest.raises(RanksError, match="there is no other rank"):
            Ranks(0, 2, timeout=7.0).agree(True)
    finally:
        dist.destroy_process_group()
    assert asked["timeout"] == store.wait.call_args.args[-1] == timedelta(seconds=7)


def test_a_plain_module_is_not_sharded() -> None:
    assert sharded(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) is None


# ── two processes ──────────────────────────────────────────────────────────────────────────────────────────────────


def agrees(rank: int) -> Any:
    ranks = Ranks.detect()
    return [ranks.agree(True), ranks.agree(rank == 0), ranks.agree(rank == 1), ranks.agree(False), ranks.size]


def names_who_failed(rank: int) -> Any:
    ranks = Ranks.detect()
    return [list(ranks.failed(ok)) for ok in (True, rank == 0, rank == 1, False)]


def broadcasts(rank: int) -> Any:
    ranks = Ranks.detect()
    value = {"step": 3, "none": None, "k": torch.arange(4.0), "nested": ("a", [1.5, {"b": torch.ones(2, 2).bool()}])}
    got = ranks.broadcast(value if rank == 0 else "what rank 1 thinks")
    same = torch.equal(got["k"], torch.arange(4.0)) and bool(got["nested"][1][1]["b"].all())
    return [got["step"], got["none"], same, got["nested"][0]]


def agrees_that_one_raised(rank: int) -> Any:
    """The pattern of a probe: each rank tries, all learn of the failure, training's collective works after it."""
    ranks = Ranks.detect()
    ok = True
    try:
        if rank == 1:
            raise RuntimeError("this rank is out of memory")
    except RuntimeError:
        ok = False
    failed = ranks.failed(ok)
    return [list(failed), training_goes_on(rank)]


def training_goes_on(rank: int) -> float:
    x = torch.tensor([float(rank + 1)])
    dist.all_reduce(x)
    return float(x)


def one_is_absent(rank: int) -> Any:
    """Rank 1 skips a collective: rank 0 raises within the timeout, then at once; both train on."""
    ranks = Ranks.detect(timeout=WAIT)
    ranks.agree(True)
    said, collectives = [], []
    if rank == 0:
        for _ in range(2):
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
                said.append(caught(lambda: ranks.agree(True)))
            collectives.append(sent.call_count)
    trained = training_goes_on(rank)
    late = caught(lambda: ranks.broadcast(1))
    fresh = caught(lambda: Ranks.detect(timeout=WAIT).agree(True))
    return {"said": said, "collectives": collectives, "trained": trained, "late": late, "fresh": fresh}


def one_is_absent_from_the_start(rank: int) -> Any:
    """… even from the making of the group."""
    ranks = Ranks.detect(timeout=WAIT)
    said = caught(lambda: ranks.agree(True)) if rank == 0 else None
    return {"said": said, "trained": training_goes_on(rank)}


def cannot_be_sent(rank: int) -> Any:
    ranks = Ranks.detect()
    said = caught(lambda: ranks.broadcast(lambda: 1))
    return {"said": said, "after": ranks.broadcast(7 + rank)}


def leaves_the_random_state(rank: int) -> Any:
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    ranks = Ranks.detect()
    ranks.agree(True)
    ranks.broadcast({"a": torch.ones(3)})
    return torch.equal(before, torch.get_rng_state())


def works_in_any_mode(rank: int) -> Any:
    """Hooks of a Trainer run without gradients, in inference mode, or with another default type."""
    ranks, seen = Ranks.detect(), []
    torch.set_default_dtype(torch.float64)
    with torch.inference_mode():
        seen.append(ranks.agree(True))
    with torch.no_grad():
        seen.append(ranks.broadcast(torch.ones(1)).item())
    with torch.device("meta"):
        seen.append(ranks.agree(rank == 0))
        seen.append(ranks.broadcast((1.5, torch.ones(1, device="cpu")))[0])
    return seen


def makes_one_group(rank: int) -> Any:
    before = len(dist.distributed_c10d._world.pg_map)
    for _ in range(3):
        Ranks.detect()
    untouched = len(dist.distributed_c10d._world.pg_map) - before
    for _ in range(3):
        Ranks.detect().agree(True)
    return [untouched, len(dist.distributed_c10d._world.pg_map) - before]


def outlives_its_default_group(rank: int, folder: str) -> Any:
    """A second fit in the same process, after the first one's group was destroyed."""
    answers = [Ranks.detect().agree(True)]
    dist.destroy_process_group()
    answers.append(Ranks.detect().size)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=WORLD)
    answers.append(Ranks.detect().agree(True))
    return answers


def joins(rank: int) -> Any:
    """Means as DDP takes them: what one rank lacks is zero there, what both lack stays absent. Votes, counts beside."""
    ranks = Ranks.detect()
    like = {"w": torch.zeros(2, 2), "b": torch.zeros(()).double(), "idle": torch.zeros(3)}
    mine = {"w": torch.full((2, 2), 1.0 + rank), "b": torch.tensor(4.0).double() if rank else None, "idle": None}
    both, one = (ranks.join(mine, like, ok=ok, count=rank + 1) for ok in (True, rank == 0))
    half = ranks.join({"w": torch.full((2, 2), torch.nan)} if rank else mine, like, ok=rank == 0, count=1)
    return [
        [both.gradients["w"].tolist(), float(both.gradients["b"]), str(both.gradients["b"].dtype), both.failed],
        [both.gradients["idle"], both.count, one.failed, half.gradients["w"].tolist(), half.failed],
    ]


def joins_with_one_absent(rank: int) -> Any:
    ranks = Ranks.detect(timeout=WAIT)
    ranks.agree(True)
    said = caught(lambda: ranks.join({}, {"w": torch.zeros(2)}, ok=True, count=1)) if rank == 0 else None
    return {"said": said, "trained": training_goes_on(rank)}


def stops_on_rank_0(rank: int) -> Any:
    """A KeyboardInterrupt of rank 0's goes on its way, and rank 1 does not wait for a rank that is leaving."""
    ranks, failures = Ranks.detect(), ErrorPolicy("warn", False)

    def interrupted() -> None:
        raise KeyboardInterrupt

    try:
        said = run_on_rank_zero(ranks, failures, interrupted, lambda value: value).failure
    except KeyboardInterrupt:
        said = ("KeyboardInterrupt", None)
    return [said, training_goes_on(rank)]


def waits_half_as_long_as_training(rank: int) -> Any:
    """Our group has our own timeout, which is at most half of training's."""
    group = dist.distributed_c10d._get_default_group()
    own = Ranks.detect()
    own.agree(True)
    ours = distributed._own_group(own.timeout).group()
    set_to = ours._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    before = group._get_backend(torch.device("cpu")).options._timeout
    group._get_backend(torch.device("cpu")).options._timeout = timedelta(seconds=40)
    short = Ranks.detect().timeout
    group._get_backend(torch.device("cpu")).options._timeout = before
    return [own.timeout, set_to, short]


def names_what_is_sharded(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    tensor_parallel = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    weight = distribute_tensor(tensor_parallel[1].weight.detach(), mesh, [Shard(0)])
    tensor_parallel[1].weight = nn.Parameter(weight)
    fsdp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(fsdp[1], mesh=mesh)
    return [sharded(tensor_parallel), sharded(fsdp)]


def caught(work: Callable[[], Any]) -> str:
    try:
        return f"no error, {work()}"
    except RanksError as error:
        return str(error)


def _worker(rank: int, folder: str, tasks: list[tuple[str, bool]], pipe: Any) -> None:
    torch.set_num_threads(1)
    for name, wants_folder in tasks:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=WORLD)
        try:
            answer = globals()[name](rank, folder) if wants_folder else globals()[name](rank)
            pipe.send(json.dumps(answer))
        except Exception:
            pipe.send(json.dumps({"crashed": traceback.format_exc()}))
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()


TASKS = [
    agrees, names_who_failed, broadcasts, agrees_that_one_raised, cannot_be_sent, leaves_the_random_state,
    works_in_any_mode, joins, joins_with_one_absent, makes_one_group, one_is_absent, one_is_absent_from_the_start,
    names_what_is_sharded, outlives_its_default_group, stops_on_rank_0, waits_half_as_long_as_training,
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Every task, on two processes that are started once."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    context = multiprocessing.get_context("spawn")
    tasks = [(task.__name__, task is outlives_its_default_group) for task in TASKS]
    pipes, processes = [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_worker, args=(rank, folder, tasks, theirs)))
        pipes.append(ours)
        processes[-1].start()
    found: dict[str, list[Any]] = {}
    for name, _ in tasks:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(120), f"{name}: rank {rank} hangs"
            found.setdefault(name, []).append(json.loads(pipe.recv()))
    for process in processes:
        process.join(30)
        assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
    return found


EXPECTED: dict[Callable[..., Any], Any] = {
    agrees: [True, False, False, False, WORLD],
    names_who_failed: [[], [1], [0], [0, 1]],
    broadcasts: [3, None, True, "a"],
    agrees_that_one_raised: [[1], 3.0],
    leaves_the_random_state: True,
    works_in_any_mode: [True, 1.0, False, 1.5],
    makes_one_group: [0, 1],
    joins: [
        [[[1.5, 1.5], [1.5, 1.5]], 2.0, "torch.float64", []],
        [None, 3, [1], [[0.5, 0.5], [0.5, 0.5]], [1]],
    ],
    outlives_its_default_group: [True, 1, True],
    waits_half_as_long_as_training: [300.0, 300.0, 20.0],
    names_what_is_sharded: ["1.weight is a DTensor", "1 is managed by FSDPModule"],
}


@pytest.mark.parametrize("task", EXPECTED, ids=lambda task: task.__name__)
def test_both_ranks_say(task: Callable[..., Any], answers: dict[str, list[Any]]) -> None:
    for rank in range(WORLD):
        assert answers[task.__name__][rank] == EXPECTED[task], f"{task.__name__} on rank {rank}"


def test_absence_raises_in_time_and_training_goes_on(answers: dict[str, list[Any]]) -> None:
    waiting, absent = answers["one_is_absent"]
    assert "crashed" not in waiting, waiting
    assert f"rank 0 waited to agree with 2 ranks and one did not come within {WAIT} s" in waiting["said"][0]
    assert "an earlier collective failed" in waiting["said"][1]
    assert waiting["collectives"] == [1, 0], "the second call must not wait again"
    assert waiting["trained"] == absent["trained"] == 3.0, "training's own group was harmed"
    assert "rank 1 waited to broadcast" in absent["late"], "the absent rank is told when it comes back"
    for rank in (waiting, absent):
        assert "an earlier collective failed" in rank["fresh"], "a new Ranks of the same run waits for nobody either"


def test_absence_at_the_first_collective(answers: dict[str, list[Any]]) -> None:
    waiting, absent = answers["one_is_absent_from_the_start"]
    assert f"one did not come within {WAIT} s" in waiting["said"], waiting
    assert waiting["trained"] == absent["trained"] == 3.0


def test_absence_at_a_step_raises_and_training_goes_on(answers: dict[str, list[Any]]) -> None:
    waiting, absent = answers["joins_with_one_absent"]
    assert "rank 0 waited to add up gradients with 2 ranks" in waiting["said"], waiting
    assert waiting["trained"] == absent["trained"] == 3.0


def test_a_stop_of_rank_0_is_known_before_it_leaves(answers: dict[str, list[Any]]) -> None:
    first, second = answers["stops_on_rank_0"]
    assert first == [["KeyboardInterrupt", None], 3.0]
    assert second == [["was not finished: the run was told to stop (KeyboardInterrupt)", "stopped"], 3.0]


def test_a_probe_that_is_foreseen_to_take_too_long_says_how_many_would_do() -> None:
    ranks = Ranks(0, 2, timeout=100)
    with pytest.raises(TooLong, match=r"64 examples may take some 80 s, more than the 50 s .*; 40 would") as raised:
        ranks.foresee(80.0, 64)
    assert told(raised.value)[1] == "time"
    ranks.foresee(80.0 * 40 / 64, 40)
    Ranks(0, 1).foresee(1e6, 64)  # alone, nobody waits


def test_what_cannot_be_sent_raises_on_every_rank(answers: dict[str, list[Any]]) -> None:
    for rank in range(WORLD):
        answer = answers["cannot_be_sent"][rank]
        assert "rank 0 cannot send its function" in answer["said"], f"rank {rank}: {answer}"
        assert answer["after"] == 7, f"rank {rank}: the group works on"


def test_no_test_is_left_out() -> None:
    others = {stops_on_rank_0, joins_with_one_absent, one_is_absent, one_is_absent_from_the_start, cannot_be_sent}
    assert set(TASKS) == set(EXPECTED) | others


def test_nothing_leaks_into_this_process(answers: dict[str, list[Any]]) -> None:
    assert not dist.is_initialized(), "a process group was left behind"

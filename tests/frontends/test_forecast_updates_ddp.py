"""The linear forecast under DDP on two gloo processes: exact, one all-reduce a step, and together in every fault."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ntkwatch.frontends.forecast_support import why_not
from tests.support import forecast_ddp
from tests.support.forecast_ddp import ALONE, BLIND, CASES, EXACT, FAULTS, REFUSED, UNION
from tests.support.scripts import fault_of

ORDINARY = [
    *UNION, "the last batch short", "unused on one rank", "resumed", "__init__ fails on rank 1", "add fails on rank 1",
    "stepped fails on rank 0", *REFUSED, *BLIND,
]  # fmt: skip
Seen = dict[str, list[dict[str, Any]]]


def trained(folder: Path, cases: Sequence[str]) -> Seen:
    """The script's two processes over all cases; what each rank saw."""
    fault = fault_of(forecast_ddp.__file__, "ddp", folder, *cases)
    assert fault is None, fault
    return {case: [json.loads((folder / case / f"rank{rank}.json").read_text()) for rank in (0, 1)] for case in cases}


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return trained(tmp_path_factory.mktemp("ddp"), ORDINARY)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    forecast_ddp.main(ALONE, str(folder), *UNION)
    return {case: json.loads((folder / case / "rank0.json").read_text()) for case in UNION}


def assert_exact(case: str, ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    metrics = first["metrics"]
    assert max(metrics["forecast_error"][1:]) < 1e-12, f"{case}: {metrics}"
    gaps = [abs(a - b) for a, b in zip(metrics["loss"], metrics["loss_if_lazy"], strict=True)]
    assert max(gaps) < 1e-10, f"{case}: {metrics}"
    assert metrics["forecast_start_error"][-1] < 1e-12, case
    assert metrics["loss"][-1] < 0.99 * metrics["loss"][0], f"{case}: the run moves"
    for rank in ranks:
        assert rank["count"] == rank["steps"] - 3 * CASES[case].resumed > 0, f"{case}: one all-reduce a step"
    assert first["weights"] == second["weights"], case


def assert_together(case: str, ranks: list[dict[str, Any]]) -> None:
    """Both ranks train on to the end, none waits for the other, and rank 0 says what happened where."""
    reason, rank = ranks[0]["reasons"]["forecast_error"], int(case[-1])
    assert [seen["global_step"] for seen in ranks] == [forecast_ddp.STEPS] * 2, case
    assert ranks[0]["count"] == ranks[1]["count"] < forecast_ddp.STEPS, case
    assert ("no such kernel" if rank == 0 else f"on rank {rank}") in reason, f"{case}: {reason}"
    assert all(math.isfinite(angle) for angle in ranks[0]["metrics"]["kernel_angle"]), case


@pytest.mark.parametrize("case", [case for case in ORDINARY if case in EXACT])
def test_a_linear_network_does_what_is_forecast(case: str, ordinary: Seen) -> None:
    assert_exact(case, ordinary[case])


@pytest.mark.parametrize("case", UNION)
def test_two_processes_forecast_as_one_does_on_the_union_of_their_batches(
    case: str, ordinary: Seen, alone: dict[str, dict[str, Any]]
) -> None:
    for name, value in alone[case]["metrics"].items():
        if name != "forecast_error":  # rounding in both
            assert ordinary[case][0]["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), name


def test_without_the_all_reduce_the_forecast_is_off(ordinary: Seen) -> None:
    (case,) = BLIND
    assert ordinary[case][0]["metrics"]["forecast_error"][-1] > 0.01


@pytest.mark.parametrize("case", [case for case in ORDINARY if case in FAULTS])
def test_a_rank_that_fails_ends_the_forecast_on_all_and_the_run_goes_on(case: str, ordinary: Seen) -> None:
    assert_together(case, ordinary[case])


@pytest.mark.parametrize("case", REFUSED)
def test_what_ddp_does_otherwise_is_refused(case: str, ordinary: Seen) -> None:
    seen = ordinary[case]
    assert case in seen[0]["reasons"]["loss_if_lazy"].replace("a DDP", "a"), seen[0]["reasons"]
    assert [rank["count"] for rank in seen] == [0, 0]


@pytest.mark.soak
def test_every_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = trained(tmp_path, list(CASES))
    for case in EXACT:
        assert_exact(case, seen[case])
    for case in FAULTS:
        assert_together(case, seen[case])
    with capsys.disabled():
        print(
            f"\nforecast under DDP: {len(EXACT)} ways of stepping exact, {len(FAULTS)} faults, 0 hung, 0 silently wrong"
        )


class Simple(pl.strategies.SingleDeviceStrategy):
    """A class of the user's own is what it is made from."""


STRATEGIES: dict[str, tuple[Any, str | None]] = {
    "one device": (pl.strategies.SingleDeviceStrategy("cpu"), None),
    "a class of one's own": (Simple("cpu"), None),
    "DDP": (pl.strategies.DDPStrategy(), None),
    "DDP that averages models": (pl.strategies.DDPStrategy(model_averaging_period=4), "averages models"),
    "FSDP": (pl.strategies.FSDPStrategy.__new__(pl.strategies.FSDPStrategy), "is FSDPStrategy"),
    "model parallel": (pl.strategies.ModelParallelStrategy(), "is ModelParallelStrategy"),
    "DeepSpeed": (pl.strategies.DeepSpeedStrategy.__new__(pl.strategies.DeepSpeedStrategy), "is DeepSpeedStrategy"),
    "another": (object(), "is object"),
}


@pytest.mark.parametrize("case", STRATEGIES)
def test_strategies_whose_gradients_are_not_known_are_refused(case: str) -> None:
    strategy, reason = STRATEGIES[case]
    module = forecast_ddp.Model(lambda ps: torch.optim.SGD(ps, 0.1))
    told = why_not(SimpleNamespace(strategy=strategy, optimizers=[0], gradient_clip_val=None), module)
    assert told is None if reason is None else reason in str(told), f"{case}: {told}"

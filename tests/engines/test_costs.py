"""What is foretold of time: laws of the costs that choices rest on, and a trial that no choice rests on. No clock."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ntkwatch.engines import plan, planning, trial
from ntkwatch.engines.costs import choose, gram_cost, jacobian_cost, products
from ntkwatch.engines.factors import Columns, Outer
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.machines import MACHINES, machine
from ntkwatch.engines.outputs import PerOutput
from ntkwatch.engines.run import Run
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.bench.contractions import SHAPES
from tests.support.cases import build, find

CPU, F64 = torch.device("cpu"), torch.float64
SIDES = ("n", "C", "groups", "positions", "p", "q")


def shaped(n: int, c: int, groups: int, s: int, p: int, q: int) -> Outer:
    """A factor that has shapes and no memory."""
    g = tuple(torch.empty(1).expand(n, groups, s, q) for _ in range(c))
    return Outer(Columns.of(torch.empty(1).expand(n, groups, s, p)), PerOutput(g))


@pytest.mark.parametrize("reduction", ["trace", "blocks", "full", "sum"])
@pytest.mark.parametrize("name", SHAPES)
def test_more_of_anything_never_costs_less(name: str, reduction: str) -> None:
    sizes = SHAPES[name][:6]
    for i, side in enumerate(SIDES):
        larger = tuple(2 * size if i == j else size for j, size in enumerate(sizes))
        one, two = shaped(*sizes), shaped(*larger)
        for cost in (gram_cost, jacobian_cost):
            before, after = cost(one, one.n, one.n, reduction, F64), cost(two, two.n, two.n, reduction, F64)
            which = f"{name}, {reduction}, {cost.__name__}, twice {side}"
            assert after.seconds >= before.seconds, which
            assert after.flops >= before.flops, which
            assert after.bytes >= before.bytes, which


@pytest.mark.parametrize("name", SHAPES)
def test_the_cheaper_is_chosen(name: str) -> None:
    one = shaped(*SHAPES[name][:6])
    for reduction in ("trace", "blocks", "full", "sum"):
        how, cost = choose(one, one.n, one.n, reduction, F64)
        other = {"gram": jacobian_cost, "jacobian": gram_cost}[how](one, one.n, one.n, reduction, F64)
        assert cost.seconds <= other.seconds, f"{name}, {reduction}: {how}"


def test_small_products_reach_a_small_share_of_the_rate() -> None:
    """Of the same arithmetic, in more and smaller products; where calls are what costs, only in calls."""
    cpu = MACHINES["cpu"]
    times = [products(cpu, F64, 8.0**k, *(512.0 / 2**k,) * 3) for k in range(10)]
    assert times == sorted(times)
    assert times[-1] > 100 * times[0], "products of single numbers"
    assert 2 * 512**3 / cpu.double < times[0] < 1.1 * 2 * 512**3 / cpu.double, "large products at the full rate"


def test_depthwise_costs_more_than_its_arithmetic() -> None:
    """64 groups of one channel, and the same arithmetic in one group."""
    apart, together = shaped(32, 10, 64, 256, 9, 1), shaped(32, 10, 1, 256, 64, 9)
    costs = [jacobian_cost(one, 32, 32, "trace", F64) for one in (apart, together)]
    assert costs[0].flops == pytest.approx(costs[1].flops)
    assert costs[0].seconds > 2 * costs[1].seconds


def test_nothing_is_cheaper_than_its_calls() -> None:
    one, call = shaped(3, 2, 1, 4, 3, 4), machine(CPU).call
    assert gram_cost(one, 3, 3, "trace", F64).seconds > 10 * call
    assert jacobian_cost(one, 3, 3, "trace", F64).seconds > 10 * call


def run_of(module: nn.Module, x: object) -> Run:
    network = Network(module)
    return Run(network, None, "trace", "double", Layerwise().recipe(network, x, None))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 100])
@pytest.mark.parametrize(("fixed", "each"), [(0.004, 0.0), (0.0, 1e-4), (0.002, 3e-4), (0.0, 2.0)])
def test_a_trial_is_continued_to_all_probes(monkeypatch: pytest.MonkeyPatch, n: int, fixed: float, each: float) -> None:
    """Exactly, where passes take a fixed time and as much for each probe."""
    asked: list[int] = []

    def once(run: object, block: torch.Tensor) -> float:
        asked.append(len(block))
        return fixed + each * len(block)

    monkeypatch.setattr(trial, "_once", once)
    found = trial.seconds_of_passes(None, torch.zeros(n, 1), n, 12)  # type: ignore[arg-type]
    assert found == pytest.approx(fixed + each * n)
    assert max(asked) <= 12, "more probes than a few were passed through"
    assert sum(fixed + each * size for size in asked) < 1 or len(asked) == 1, "a slow model was passed through twice"


def test_a_trial_takes_all_outputs_into_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """From some of them: 40 outputs take 40/32 of what 32 take, and the forward pass is made once."""
    ticks = iter([0.0, 5.0, 37.0])
    monkeypatch.setattr(trial, "_clock", lambda device: ticks)
    module, x = nn.Linear(3, 40), torch.randn(4, 3)
    with leave_no_trace(module):
        run = run_of(module, x)
        assert trial._once(run, x) == pytest.approx(5.0 + 32.0 * 40 / 32)


@pytest.mark.parametrize("case", ["mlp", "conv2d", "conv_groups", "transformer_encoder", "lstm"])
def test_nothing_is_decided_by_a_time(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Only the seconds of the passes tell whether passes took a moment or an hour."""
    module, x = build(find(case), torch.float32)
    plans = []
    for seconds in (1e-6, 3600.0):
        monkeypatch.setattr(trial, "_once", lambda run, block, seconds=seconds: seconds)
        plans.append(plan(module, x))
    one, two = plans
    assert one.seconds < 60 < 3600 <= two.seconds, "the trial is not told"
    assert dataclasses.replace(one, table=one.table[1:]) == dataclasses.replace(two, table=two.table[1:])
    passes = [dataclasses.replace(found.table[0], seconds=0.0) for found in plans]
    assert passes[0] == passes[1]
    assert passes[0].name == planning.PASSES

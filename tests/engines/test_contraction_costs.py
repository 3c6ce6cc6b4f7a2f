"""What is predicted of time: laws of the costs that choices rest on, and seconds that no choice rests on. No clock."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ntkwatch.engines import extrapolation, plan, planning
from ntkwatch.engines.contraction_costs import choose, gram_cost, jacobian_cost, products
from ntkwatch.engines.factors import Columns, Outer
from ntkwatch.engines.machines import MACHINES, machine
from ntkwatch.engines.per_output import PerOutput
from tests.bench.contractions import SHAPES
from tests.support.cases import build, find
from tests.support.clocks import ticking

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


@pytest.mark.parametrize("grows", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("calls", [0, 10, 10**9])
def test_time_grows_but_for_that_of_calls(calls: int, grows: float) -> None:
    fixed = min(2.0, calls * machine(CPU).call)
    assert extrapolation._larger(2.0, calls, grows, CPU) == pytest.approx(fixed + (2.0 - fixed) * grows)


@pytest.mark.parametrize("chunk", range(1, 70))
def test_a_small_kernel_takes_about_a_quarter_of_the_probes(chunk: int) -> None:
    size = extrapolation.small_block(chunk)
    assert size <= chunk
    assert size == chunk or (size >= 3 and size % 2 == 1 and size <= chunk / 4 + 2)


@pytest.mark.parametrize("case", ["mlp", "conv2d", "conv_groups", "transformer_encoder", "lstm"])
def test_nothing_is_decided_by_a_time(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Only seconds tell whether a small kernel took a moment or an hour."""
    module, x = build(find(case), torch.float32)
    plans = []
    for seconds in (1e-9, 3600.0):
        monkeypatch.setattr(extrapolation, "clock", ticking(seconds))
        plans.append(plan(module, x))
    one, two = plans
    assert one.seconds < 60 < 3600 <= two.seconds, "the clock is not read"
    timeless = [[dataclasses.replace(row, seconds=0.0) for row in found.table] for found in plans]
    assert timeless[0] == timeless[1]
    assert dataclasses.replace(one, table=()) == dataclasses.replace(two, table=())
    assert one.table[0].name == planning.PASSES

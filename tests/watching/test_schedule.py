"""Schedule: the grids, thinning that keeps steps in common, and the budget, on a clock that the tests turn."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from ntkwatch.watching.schedule import Schedule
from tests.support.operations import calls

LOG = sorted({round(2 ** (k / 4)) for k in range(4 * 24)})


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """A training run in which a step takes `step` seconds and a probe `cost(i)`."""

    steps: int
    step: float
    cost: Callable[[int], float]
    every: Any = "log"
    budget: float | None = 0.02
    planning: float = 0.0
    stride: int = 1  # the callback may see only every stride-th step
    fired: list[int] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def play(self, schedule: Schedule | None = None, clock: Clock | None = None, first: int = 0) -> Schedule:
        clock = clock or Clock()
        schedule = schedule or Schedule(self.every, self.budget, clock=clock)
        schedule.start()
        with schedule.probing():
            clock.now += self.planning
        for step in range(first, self.steps + 1, self.stride):
            clock.now += self.step * self.stride * (step > first)
            if schedule.due(step, last=step == self.steps):
                with schedule.probing():
                    clock.now += (cost := self.cost(len(self.fired)))
                self.fired.append(step)
                self.costs.append(cost)
        return schedule


def constant(seconds: float) -> Callable[[int], float]:
    return lambda probe: seconds


SCENARIOS = {
    "cheap probes": Run(20_000, 0.01, constant(0.001)),
    "a minute of training": Run(6_000, 0.01, constant(0.2)),
    "a minute, one-second probes": Run(60_000, 0.001, constant(1.0)),
    "ten minutes, half-second probes": Run(60_000, 0.01, constant(0.5)),
    "slow steps": Run(500, 10.0, constant(3.0)),
    "a probe dearer than the allowance": Run(50_000, 0.01, constant(12.0)),
    "a probe dearer than the whole run": Run(1_000, 0.001, constant(100.0)),
    "costs that grow": Run(30_000, 0.01, lambda probe: 0.05 * (probe + 1)),
    "costs that fall": Run(30_000, 0.01, lambda probe: 5.0 / (probe + 1)),
    "noisy costs": Run(30_000, 0.01, lambda probe: (0.1, 0.9, 0.2, 0.4)[probe % 4]),
    "one slow probe": Run(30_000, 0.01, lambda probe: 30.0 if probe == 7 else 0.05),
    "a slow first probe": Run(30_000, 0.01, lambda probe: 20.0 if probe == 0 else 0.1),
    "planning above the allowance": Run(30_000, 0.01, constant(0.1), planning=40.0),
    "every step": Run(20_000, 0.01, constant(0.1), every=1),
    "every 50 steps": Run(20_000, 0.01, constant(0.4), every=50),
    "every 50 steps, dear": Run(20_000, 0.01, constant(4.0), every=50),
    "no budget beyond the allowance": Run(20_000, 0.01, constant(0.3), budget=0.0),
    "a tenth of the time": Run(20_000, 0.01, constant(0.3), budget=0.1),
    "steps in pairs (two optimizers)": Run(20_000, 0.01, constant(0.3), stride=2),
    "a free probe": Run(3_000, 0.01, constant(0.0)),
    "one step": Run(1, 0.01, constant(0.3)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_budget_holds(name: str) -> None:
    scenario = SCENARIOS[name]
    run = Run(**{**vars(scenario), "fired": [], "costs": []})
    schedule = run.play()
    assert schedule.budget is not None
    allowed = schedule.allowance + schedule.budget * schedule.elapsed
    unplanned = run.costs[0] + run.costs[-1] + max(run.costs) + max(run.planning - schedule.allowance, 0.0)
    assert schedule.spent == pytest.approx(sum(run.costs) + run.planning), f"{name}: probes are not all counted"
    assert schedule.spent <= allowed + unplanned + 1e-9, f"{name}: spent {schedule.spent:.1f} s of {allowed:.1f} s"
    assert schedule.overhead == pytest.approx(schedule.spent / schedule.elapsed)
    last = max(range(0, run.steps + 1, run.stride))
    assert run.fired[0] == 0, f"{name}: the first step was dropped"
    assert run.fired[-1] == last, f"{name}: the last step was dropped"
    assert run.fired == sorted(set(run.fired)), f"{name}: a step fired twice"


@pytest.mark.parametrize("every", ["log", 1, 50])
def test_runs_share_steps_however_dear_their_probes_are(every: Any) -> None:
    """Thinned runs keep steps of one nested grid: what the dear run probes, the cheap one has probed too."""
    cheap, dear = Run(40_000, 0.01, constant(0.01), every=every), Run(40_000, 0.01, constant(0.8), every=every)
    cheap.play(), dear.play()
    if every == 1:  # neither probes every step
        common = set(cheap.fired) & set(dear.fired)
        assert len(common) >= 0.6 * len(dear.fired), f"every=1: only {len(common)} of {len(dear.fired)} are shared"
    else:
        assert set(dear.fired) <= set(cheap.fired), f"every={every}: {set(dear.fired) - set(cheap.fired)} not shared"
    assert 5 <= len(dear.fired) < len(cheap.fired), f"every={every}: {dear.fired}"


def test_a_thinned_log_grid_is_every_second_fourth_or_eighth_k() -> None:
    run = Run(20_000, 0.001, constant(0.5))
    clock = Clock()
    schedule = Schedule("log", 0.02, clock=clock)
    run.play(schedule, clock)
    coarse = {round(2 ** (k / 4)) for k in range(0, 96, 2)} | {0, 20_000}
    late = [step for step in run.fired if step > 16]
    assert schedule.level >= 1, "this run was meant to be thinned"
    assert set(late) <= coarse, f"steps off the thinned grid: {set(late) - coarse}"


@pytest.mark.parametrize(("steps", "step", "cost", "least"), [(6_000, 0.01, 0.2, 14), (60_000, 0.001, 1.0, 6)])
def test_a_run_of_a_minute_draws_a_curve(steps: int, step: float, cost: float, least: int) -> None:
    run = Run(steps, step, constant(cost))
    run.play()
    assert len(run.fired) >= least, f"only {run.fired}"
    late = [fired for fired in run.fired if fired > 8]
    assert len(late) >= 2, f"the allowance went into the first steps: {run.fired}"


def test_a_long_run_is_not_thinned_for_ever() -> None:
    """Once time has passed the grid is dense again."""
    run = Run(400_000, 0.01, constant(0.5))
    schedule = run.play()
    assert schedule.level == 0
    assert [s for s in run.fired if s > 100_000] == [s for s in LOG if 100_000 < s < 400_000] + [400_000]


def test_every_n_settles_on_what_the_budget_pays_for() -> None:
    run = Run(100_000, 0.01, constant(0.4), every=10)
    schedule = run.play()
    gaps = set(np.diff([fired for fired in run.fired if fired > 50_000]))
    assert max(gaps) in (2560, 5120), f"0.4 s at 2 % of 0.01 s a step are 2,000 steps, a power of two times ten; {gaps}"
    assert schedule.overhead < 0.02 + 5 / schedule.elapsed


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("log", [0, *[s for s in LOG if s <= 100]]),
        (7, list(range(0, 101, 7))),
        ([3, 50, 50, 20], [0, 3, 20, 50]),
        ([0], [0]),
        (range(0, 100, 30), [0, 30, 60, 90]),
        ({5, 9}, [0, 5, 9]),
        (np.array([4, 8]), [0, 4, 8]),
        (np.int64(40), [0, 40, 80]),
        (lambda step: step % 33 == 0, [0, 33, 66, 99]),
    ],
    ids=["log", "int", "list", "the first alone", "range", "set", "array", "numpy int", "function"],
)
def test_the_grid(every: Any, expected: list[int]) -> None:
    schedule = Schedule(every, None)
    assert [step for step in range(101) if schedule.due(step)] == expected


@pytest.mark.parametrize("every", [[5, 10, 400], lambda step: step in (5, 10, 400)], ids=["list", "function"])
def test_lists_and_functions_are_never_dropped(every: Any) -> None:
    run = Run(500, 0.001, constant(60.0), every=every)
    run.play()
    assert run.fired == [0, 5, 10, 400, 500]


def test_a_step_missed_fires_at_the_next_call_once() -> None:
    schedule = Schedule([6, 7, 20], None)
    fired = [step for step in (0, 5, 7, 7, 8, 19, 25, 25, 30) if schedule.due(step)]
    assert fired == [0, 7, 25], "6 and 7 fire together at 7; 20 fires at 25"


@pytest.mark.parametrize("every", ["log", 3, lambda step: step % 3 == 0])
def test_jumps_lose_no_step(every: Any) -> None:
    """Called at every fifth step only, a schedule fires wherever one of the steps in between was due."""
    dense, sparse = Schedule(every, None), Schedule(every, None)
    due = [step for step in range(301) if dense.due(step)]
    fired = [step for step in range(0, 301, 5) if sparse.due(step)]
    assert fired == sorted({-(-step // 5) * 5 for step in due})


def test_the_same_step_fires_once_and_an_earlier_one_never() -> None:
    schedule = Schedule(1, None)
    assert [schedule.due(step) for step in (0, 0, 1, 1, 0, 2)] == [True, False, True, False, False, True]


def test_last_fires_unless_it_just_did() -> None:
    schedule = Schedule([10], None)
    assert [schedule.due(s, last=s == 12) for s in (0, 10, 11, 12)] == [True, True, False, True]
    assert not schedule.due(12, last=True), "the last step fired twice"
    assert schedule.due(0) is False
    late = Schedule([10], None)
    late.due(0), late.due(7)
    assert late.due(7, last=True), "a step that was seen but not probed is probed when it turns out the last"


def test_first_of_a_fresh_callback_on_a_resumed_run() -> None:
    schedule = Schedule("log", None)
    assert [step for step in range(5000, 6200) if schedule.due(step)] == [5000, 5793]


@pytest.mark.parametrize("every", ["log", 20, [3, 700, 1500]])
def test_resume_goes_on_as_if_nothing_happened(every: Any) -> None:
    """Cut at any step, state through JSON, a new clock: the same steps fire as in the uninterrupted run."""
    whole = Run(2_000, 0.01, constant(0.2), every=every)
    whole.play()
    for cut in (1, 2, 13, 64, 500, 1_023, 1_999):
        clock = Clock()
        before = Run(cut, 0.01, constant(0.2), every=every)
        first = Schedule(every, clock=clock)
        for step in range(cut + 1):
            clock.now += 0.01 * (step > 0)
            if first.due(step):
                with first.probing():
                    clock.now += 0.2
                before.fired.append(step)
        state = json.loads(json.dumps(first.state_dict()))
        other = Clock()
        other.now = 5.0
        second = Schedule(every, clock=other)
        second.load_state_dict(state)
        after = Run(2_000, 0.01, constant(0.2), every=every)
        second.start()
        for step in range(cut + 1, 2_001):
            other.now += 0.01
            if second.due(step, last=step == 2_000):
                with second.probing():
                    other.now += 0.2
                after.fired.append(step)
        assert before.fired + after.fired == whole.fired, f"every={every}, cut at {cut}"
        assert second.spent == pytest.approx(0.2 * len(whole.fired)), f"every={every}, cut at {cut}"


def test_time_between_sessions_is_nobodys() -> None:
    clock = Clock()
    schedule = Schedule("log", clock=clock)
    schedule.start()
    clock.now += 10
    state = schedule.state_dict()
    clock.now += 1e6
    resumed = Schedule("log", clock=clock)
    resumed.load_state_dict(state)
    assert resumed.elapsed == 10
    resumed.start()
    clock.now += 1
    assert resumed.elapsed == 11


def test_it_can_be_sent_to_another_process() -> None:
    """ddp_spawn pickles callbacks."""
    for every in ("log", 7, [3, 9]):
        schedule = Schedule(every, None)
        fired = [schedule.due(step) for step in range(5)]
        other = pickle.loads(pickle.dumps(schedule))
        assert [other.due(s) for s in range(20)] == [False] * 5 + [schedule.due(s) for s in range(5, 20)], every
        assert fired[0]


def test_a_state_that_lacks_something_is_taken_as_far_as_it_goes() -> None:
    schedule = Schedule("log")
    schedule.load_state_dict({"spent": 2.0, "seen": 8, "last_fired": 8, "first": 0})
    assert schedule.spent == 2.0
    assert [step for step in range(12) if schedule.due(step)] == [10, 11]


def test_probing_counts_failures_nesting_and_the_running_probe() -> None:
    clock = Clock()
    schedule = Schedule("log", clock=clock)
    schedule.due(0)

    def failing() -> None:
        with schedule.probing(), schedule.probing():
            clock.now += 2
            assert schedule.spent == 2, "the running probe counts"
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        failing()
    assert schedule.spent == 2, "a nested call counts once"
    assert schedule.predicted == 2
    clock.now += 6
    assert schedule.overhead == pytest.approx(0.25)


def test_time_aside_is_overhead_and_takes_no_probe_away() -> None:
    clock = Clock()
    schedule = Schedule("log", clock=clock)
    schedule.start()
    with schedule.aside():
        clock.now += 3
    clock.now += 1
    assert schedule.overhead == 0.75, "of all the time, three seconds in four"
    assert schedule.spent == 0, "no probe took it"
    with schedule.probing():
        clock.now += 1
    assert schedule.overhead == pytest.approx(0.8)
    fired = []
    for aside in (0.0, 0.125):  # of each step, sixteen times what the run itself takes
        clock = Clock()
        schedule, steps = Schedule("log", clock=clock), []
        for step in range(3_000):
            with schedule.aside():
                clock.now += aside
            clock.now += 1 / 128
            if schedule.due(step):
                steps.append(step)
                with schedule.probing():
                    clock.now += 0.25
        fired.append(steps)
    assert fired[0] == fired[1]


def test_time_spent_deciding_not_to_probe_predicts_nothing() -> None:
    clock = Clock()
    schedule = Schedule(10, clock=clock)
    for step in range(40):
        with schedule.probing():
            clock.now += 3.0 if schedule.due(step) else 1e-6
    assert schedule.predicted == 3.0


def test_time_aside_is_overhead_and_no_probe_pays_for_it() -> None:
    """The linear forecast takes its time at every step."""
    clock = Clock()
    schedule = Schedule("log", 0.02, allowance=1.0, clock=clock)
    run = Run(2_000, 0.01, constant(0.02))
    fired = Run(2_000, 0.01, constant(0.02))
    fired.play(Schedule("log", 0.02, allowance=1.0, clock=(other := Clock())), other)
    schedule.start()
    for step in range(run.steps + 1):
        clock.now += run.step
        with schedule.aside():
            clock.now += 0.03
        if schedule.due(step, last=step == run.steps):
            with schedule.probing():
                clock.now += 0.02
            run.fired.append(step)
    aside = 0.03 * (run.steps + 1)
    assert schedule.spent == pytest.approx(0.02 * len(run.fired))
    assert schedule.overhead == pytest.approx((schedule.spent + aside) / schedule.elapsed)
    assert run.fired == fired.fired, "what was asked for at every step thins no probe"


def test_a_function_that_fails_at_a_step_is_not_asked_about_it_again() -> None:
    asked: list[int] = []

    def every(step: int) -> bool:
        asked.append(step)
        if step == 2:
            raise RuntimeError("no such step")
        return True

    schedule, fired = Schedule(every, None), []
    for step in range(5):
        with contextlib.suppress(RuntimeError):
            fired += [step] * schedule.due(step)
    assert asked == [1, 2, 3, 4]
    assert fired == [0, 1, 3, 4]


def test_once_is_predicted_by_the_first_probe_then_by_the_recent_ones() -> None:
    clock = Clock()
    schedule = Schedule(1, None, clock=clock)
    seen = []
    for step, cost in enumerate([9.0, 1.0, 4.0, 2.0, 2.5, 2.0]):
        schedule.due(step)
        with schedule.probing():
            clock.now += cost
        seen.append(schedule.predicted)
    assert seen == [9.0, 1.0, 4.0, 4.0, 4.0, 2.5]


BAD = {
    "an unknown word": ("often", 0.02, "every='often'"),
    "zero": (0, 0.02, "every=0"),
    "negative": (-3, 0.02, "every=-3"),
    "a float": (2.5, 0.02, "every=2.5"),
    "a bool": (True, 0.02, "every=True"),
    "None": (None, 0.02, "every=None"),
    "a list of floats": ([1, 2.5], 0.02, "2.5 is no step"),
    "a negative step": ([1, -2], 0.02, "-2 is no step"),
    "an endless iterator": (itertools.count(), 0.02, "every=count(0) can be read only once"),
    "a dict of words": ({"a": 1}, 0.02, "'a' is no step"),
    "no step": ([], 0.02, "every=[] holds no step"),
    "budget in per cent": ("log", 2, "budget=2"),
    "negative budget": ("log", -0.1, "budget=-0.1"),
    "budget nan": ("log", float("nan"), "budget=nan"),
    "budget as text": ("log", "2%", "budget='2%'"),
    "budget a bool": ("log", True, "budget=True"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_say_what_and_what_to_do(name: str) -> None:
    every, budget, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Schedule(every, budget)
    assert "use" in str(caught.value) or "must be" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("allowance", [-1.0, float("inf"), float("nan"), "5", None])
def test_wrong_allowance(allowance: Any) -> None:
    with pytest.raises(ValueError, match="allowance="):
        Schedule("log", allowance=allowance)


def test_asking_is_cheap() -> None:
    """It is asked after every training step: in calls of functions, some twenty, at any step."""
    schedule = Schedule("log")
    for steps in (range(1000), range(20_000, 21_000)):
        each = calls(lambda steps=steps: [schedule.due(step) for step in steps]) / len(steps)
        assert each < 60, f"{each:.0f} calls a step, from step {steps.start}"

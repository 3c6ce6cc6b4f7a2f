"""When to probe: steps on a grid, a list or a function of the step, within a budget of wall time.

Over budget a grid thins to every second, fourth, … of its points, counted from its origin, so that two runs that thin
differently still share steps. What a user asked for step by step (a list, a function) is never thinned.
"""

from __future__ import annotations

import bisect
import math
import numbers
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from ntkwatch.measurement.overhead import OverheadClock

Every = str | int | Sequence[int] | Callable[[int], bool]

_PER_OCTAVE = 4  # the log grid is round(2^(k/4))
_SPARSEST = 3  # … and at its thinnest every eighth k: steps 1, 4, 16, 64, …
_RECENT = 3  # probes that the next one's cost is predicted from
_ALWAYS = 64  # a depth that no level reaches: never thinned
_CLOSING = 0.6  # seconds kept back for the end: the last probe and the last pictures are never dropped
_STATE = ("_first", "_seen", "last_fired", "level", "_first_cost", "_costs")


class Schedule:
    """Which steps to probe.

    Args:
        every: "log": 0 and the distinct round(2^(k/4)); an int N: multiples of N; a sequence of steps; or a function
            of the step. The first step seen is probed always.
        budget: share of wall time since the start, 0 to 1, that probes may take; None: no limit.
        allowance: seconds of probing in all that are free before the budget bites.
        clock: seconds, monotonic.

    The time spent never exceeds allowance + budget · elapsed by more than the first, the last and one more probe.

    Raises:
        ValueError: an argument that is none of these.

    >>> schedule = Schedule("log", budget=None)
    >>> [step for step in range(20) if schedule.due(step)]
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 13, 16, 19]
    """

    def __init__(
        self,
        every: Every = "log",
        budget: float | None = 0.02,
        allowance: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._every, self._grid = every, _grid(every)
        self.budget, self.allowance = _checked_budget(budget), _checked_allowance(allowance)
        self.clock = OverheadClock(clock)
        self.last_fired: int | None = None
        self.level = 0  # every 2^level-th point of the grid is probed at present
        self._first: int | None = None  # the first step seen
        self._seen = -1
        self._pending = False  # a step fired whose probe has not been timed yet
        self._first_cost = 0.0  # seconds; it holds what is only done once, so the next ones replace it
        self._costs: list[float] = []  # seconds of the latest probes

    def __getstate__(self) -> dict[str, Any]:
        """Without the grid's functions: ddp_spawn pickles callbacks."""
        return {name: value for name, value in vars(self).items() if name != "_grid"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._grid = _grid(self._every)

    def start(self) -> None:
        """Begin to count wall time; again after a resume."""
        self.clock.start()

    def due(self, step: int, last: bool = False) -> bool:
        """Whether to probe now. A scheduled s fires at the first call with step ≥ s, and once.

        last: this is the run's last step, which is never dropped.
        """
        self.start()
        if self._first is None:
            self._first = step
            return self._fire(step)
        if step <= self._seen:
            return last and step != self.last_fired and self._fire(step)
        seen, self._seen = self._seen, step  # also where a function of the user's fails: it is not asked again
        depth = self._grid.depth(seen, step)
        if last or (depth is not None and self._allows(step, depth)):
            return self._fire(step)
        return False

    def _fire(self, step: int) -> bool:
        self._seen = self.last_fired = step
        self._pending = True
        return True

    def _allows(self, step: int, depth: int) -> bool:
        if self.budget is None or depth == _ALWAYS:
            return True
        self.level = self._level(step)
        return depth >= self.level and self.predicted + _CLOSING <= self._credit

    def _level(self, step: int) -> int:
        """The sparsest thinning that the next doubling of steps asks for.

        It is paid for by the share of the time that these steps will take, and by half of what is saved: the allowance
        is not spent on the first few steps.
        """
        assert self.budget is not None
        assert self._first is not None
        income = (
            self.budget * (self.elapsed - self.clock.aside_seconds - self.spent) * step / max(step - self._first, 1)
        )
        purse = income + self._credit / 2
        if purse <= 0:
            return self._grid.sparsest
        crowding = self._grid.points(step) * self.predicted / purse
        return min(math.ceil(math.log2(max(crowding, 1.0))), self._grid.sparsest)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Time inside counts as probe time, also when it raises; nested calls count once."""
        if self.clock.is_measuring:
            yield
            return
        before = self.spent
        try:
            with self.clock.measuring():
                yield
        finally:
            cost = self.spent - before
            if self._pending and self._first_cost == 0.0:
                self._first_cost = cost
            elif self._pending:
                self._costs = [*self._costs, cost][-_RECENT:]
            self._pending = False

    def aside(self) -> AbstractContextManager[None]:
        """Time inside is overhead, but no probe's: what was asked for at every step cannot be thinned by a budget."""
        return self.clock.aside()

    @property
    def predicted(self) -> float:
        """Seconds that the next probe will take: the longest of the last three; the first while it is the only one."""
        return max(self._costs, default=self._first_cost)

    @property
    def spent(self) -> float:
        """Seconds spent probing, the current probe so far included."""
        return self.clock.spent

    @property
    def elapsed(self) -> float:
        """Seconds of wall time since the start, earlier sessions of a resumed run included."""
        return self.clock.elapsed

    @property
    def overhead(self) -> float:
        """Share of wall time since the start spent probing and aside, 0 to 1."""
        return self.clock.share

    @property
    def _credit(self) -> float:
        assert self.budget is not None
        return self.allowance + self.budget * (self.elapsed - self.clock.aside_seconds) - self.spent

    def state_dict(self) -> dict[str, Any]:
        """Primitives only: what a resumed run needs to go on as if it had not stopped."""
        state: dict[str, Any] = {name.removeprefix("_"): getattr(self, name) for name in _STATE}
        clock = {"aside": self.clock.aside_seconds, "spent": self.spent, "elapsed": self.elapsed}
        return {**state, "costs": list(self._costs), **clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The other half; time between the two sessions counts as neither spent nor elapsed."""
        for name in _STATE:
            setattr(self, name, state.get(name.removeprefix("_"), getattr(self, name)))  # an older state may lack one
        self._costs = list(self._costs)
        self.clock.aside_seconds = state.get("aside", self.clock.aside_seconds)
        self.clock.restore(float(state.get("spent", 0.0)), float(state.get("elapsed", 0.0)))
        self._pending = False


@dataclass(frozen=True)
class _Grid:
    """depth(a, b): how often the best step in (a, b] survives a halving of the grid, None where there is none;
    points(step): steps of the grid in (step, 2·step]; sparsest: the highest level."""

    depth: Callable[[int, int], int | None]
    points: Callable[[int], float] = lambda step: 1.0
    sparsest: int = 0


def _grid(every: Every) -> _Grid:
    if isinstance(every, str):
        if every != "log":
            raise ValueError(f'every={every!r} is unknown: use "log", a number of steps, a list of steps or a function')
        return _Grid(_log_depth, lambda step: float(_PER_OCTAVE), _SPARSEST)
    if callable(every):
        wanted = every
        return _Grid(lambda a, b: _ALWAYS if any(wanted(step) for step in range(a + 1, b + 1)) else None)
    if isinstance(every, Iterator):
        raise ValueError(f"every={every!r} can be read only once: use list(...) of it")
    if isinstance(every, Iterable) and getattr(every, "ndim", 1) > 0:
        steps = sorted({_step(step, every, 0) for step in every})
        if not steps:
            raise ValueError(f"every={every!r} holds no step: use every=[0] for the first and the last alone")
        return _listed(steps)
    n = _step(every, every, 1)
    return _Grid(lambda a, b: _int_depth(a // n + 1, b // n), lambda step: max(step / n, 1.0), _ALWAYS - 1)


def _step(value: Any, every: object, least: int) -> int:
    step = operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else -1
    if step < least:
        raise ValueError(
            f'every={every!r}: {value!r} is no step; use "log", a number of steps (1 or more), a list of steps '
            "(0 or more) or a function of the step"
        )
    return step


def _listed(steps: list[int]) -> _Grid:
    return _Grid(lambda a, b: _ALWAYS if bisect.bisect_right(steps, a) < bisect.bisect_right(steps, b) else None)


def _int_depth(first: int, last: int) -> int | None:
    """The most factors of two in one of first … last (0 has all of them)."""
    if first > last:
        return None
    if first <= 0:
        return _ALWAYS - 1
    depth = 0
    while (last >> (depth + 1)) << (depth + 1) >= first:
        depth += 1
    return depth


def _log_depth(a: int, b: int) -> int | None:
    """The same for the k with a < round(2^(k/4)) ≤ b; k = 0 is step 1, and step 0 stands before all of them."""
    if a < 0 <= b:
        return _ALWAYS - 1
    return _int_depth(_first_above(a), _first_above(b) - 1)


def _first_above(step: int) -> int:
    """The least k with round(2^(k/4)) > step."""
    k = max(math.floor(_PER_OCTAVE * math.log2(step)) - 1, 0) if step > 0 else 0
    while round(2 ** (k / _PER_OCTAVE)) <= step:
        k += 1
    return k


def _checked_budget(budget: float | None) -> float | None:
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 <= budget <= 1:
        raise ValueError(f"budget={budget!r} must be a share of wall time from 0 to 1, as 0.02, or None for no limit")
    return float(budget)


def _checked_allowance(allowance: float) -> float:
    if isinstance(allowance, bool) or not isinstance(allowance, numbers.Real) or not 0 <= allowance < math.inf:
        raise ValueError(f"allowance={allowance!r} must be a number of seconds, 0 or more")
    return float(allowance)

"""The steps at which a probe may be: the same on every rank, as rank 0 has them."""

from __future__ import annotations

from typing import Any

from ntkwatch.distributed import Ranks
from ntkwatch.watching.error_policy import ErrorPolicy, told
from ntkwatch.watching.schedule import Every, Schedule


class SharedSchedule:
    """Every rank walks the points of rank 0's `every=`; whether the budget lets one fire is `schedule`'s, on rank 0.

    A list may differ from rank to rank, and a function may be random or fail on one: that one is asked on rank 0 alone,
    once a step, which costs all ranks one broadcast a step.
    """

    def __init__(self, every: Every, schedule: Schedule) -> None:
        self._every, self._schedule = every, schedule
        self.asked = callable(every)
        self._points = Schedule(every, None)

    def settle(self, ranks: Ranks, failures: ErrorPolicy) -> bool:
        """Every rank takes rank 0's, before the first step and before a state is loaded; False where a rank is missing.

        failures: are told where a function of the user's fails, as any probe may.
        """
        self._ranks, self._failures = ranks, failures
        if not failures.met(ranks):
            return False
        mine: tuple[bool, Any] = (self.asked, None if self.asked else self._every)
        self.asked, every = failures.shared(ranks, mine, mine)
        if not self.asked:
            self._points = Schedule(every, None)
        return failures.off is None

    def start(self) -> None:
        """Begin to count wall time."""
        self._points.start()

    def due(self, step: int) -> bool:
        """Whether there is a point here; every rank asks, and has the same answer."""
        if not self.asked:
            return self._points.due(step)
        due, error = False, None
        try:
            due = self._ranks.first() and self._schedule.due(step)
        except Exception as raised:
            error = raised
        mine = (due, told(error) if error is not None else None)
        due, failure = self._failures.shared(self._ranks, mine, (False, None))
        if failure is not None:
            self._failures.probe(f"every= at step {step}", failure, error, start=False)
        return due

    def state_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return self._points.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The other half."""
        self._points.load_state_dict(state)

"""The measurements of one run, whatever trains it: on rank 0, within the budget's clock, under the error policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ntkwatch.distributed import Ranks
from ntkwatch.guard.default_device import cpu_default_device
from ntkwatch.guard.interruption import ProbeEnded, deferred_signals
from ntkwatch.record import Measurement
from ntkwatch.watching.error_policy import ErrorPolicy
from ntkwatch.watching.messages import others_warnings
from ntkwatch.watching.rank_zero import run_on_rank_zero
from ntkwatch.watching.results import RunResults
from ntkwatch.watching.schedule import Schedule
from ntkwatch.watching.session import Session
from ntkwatch.watching.settings import Settings
from ntkwatch.watching.shared_schedule import SharedSchedule

Work = Callable[[], Measurement | None]


class MeasurementRunner:
    """Runs the measurements of one fit. A front end sets `session` and `step`, asks `is_due` and calls `measure`.

    Args:
        settings: what the user passed.
        on_error: "warn" or "raise".
        results: keeps the record's folder and the newest measurement.

    Attributes:
        session: rank 0's; None on other ranks, and before there are probes.
        step: training steps completed.
        measured_at: the step of the newest measurement, on every rank; None before the first.
        values: by tag, the newest defined value, on every rank.
    """

    def __init__(self, settings: Settings, on_error: str, results: RunResults) -> None:
        self.results = results
        self.failures = ErrorPolicy(on_error, settings.explicit, self._note)
        self.schedule = Schedule(settings.every, settings.budget)
        self.shared_schedule = SharedSchedule(settings.every, self.schedule)
        self.ranks = Ranks.detect()
        self.session: Session | None = None
        self.step = 0
        self.measured_at: int | None = None
        self.values: dict[str, float] = {}

    @property
    def is_on(self) -> bool:
        """Whether measurements go on; the error policy switches them off for good."""
        return self.failures.off is None

    def start(self) -> None:
        """Begin to count wall time."""
        self.schedule.start()
        self.shared_schedule.start()

    def is_due(self) -> bool:
        """Whether `every=` names the present step; call it once a step, on every rank."""
        return self.is_on and self.shared_schedule.due(self.step)

    def measure(self, work: Work, last: bool = False, **options: Any) -> None:
        """Measure at the present step where the budget allows it, or where it is the last step."""

        def if_affordable() -> Measurement | None:
            return work() if last or self.shared_schedule.asked or self.schedule.due(self.step) else None

        self.run(f"the probe at step {self.step}", if_affordable, **options)

    def run(
        self,
        what: str,
        work: Work,
        start: bool = False,
        step: int | None = None,
        must_end: Callable[[], bool] = lambda: False,
        learn: Callable[[Mapping[str, float]], None] = lambda values: None,
    ) -> None:
        """Rank 0 works, every rank learns how it went: the same values, the same error, the same switch-off.

        Args:
            what: names the work in warnings.
            work: returns a measurement where it has made one.
            start: whether this comes before the first measurement, so that arguments that do not fit raise.
            step: where the measurement stands, if not at the present step.
            must_end: whether the job was told to end, so that no work begins.
            learn: receives the newest values on every rank, after a measurement.
        """

        def timed() -> Measurement | None:
            if must_end():
                raise ProbeEnded
            with self.schedule.probing(), others_warnings(), cpu_default_device():
                return work()

        with deferred_signals():
            done = run_on_rank_zero(
                self.ranks, self.failures, timed, lambda m: m and self.session and self.session.loggers.values
            )
            if done.failure is not None:
                self.failures.probe(what, done.failure, done.error, start)
            elif done.said is not None:
                self.measured_at = self.step if step is None else step
                self.failures.quietly(f"telling of {what}", partial(self._learn, done.value, done.said, learn))

    def finish(self, completed: bool) -> None:
        """Close loggers and record, and let go of the model; completed: whether the run came to its end."""
        if self.session is not None:
            self.failures.quietly("closing the loggers", partial(self.session.finish, completed))

    def summary(self) -> str:
        """The run in words, with its numbers, or why there is nothing to tell."""
        last = self.results.last
        return self.results.summary() or self.failures.instead_of_a_summary(last.step if last is not None else None)

    def _learn(
        self,
        measurement: Measurement | None,
        values: Mapping[str, float],
        learn: Callable[[Mapping[str, float]], None],
    ) -> None:
        self.failures.succeeded()
        if self.session is not None:
            self.results.keep(self.session.record, measurement)
        self.values.update({tag: value for tag, value in values.items() if tag.startswith("ntk/")})
        learn(self.values)

    def _note(self, off: str | None) -> None:
        """Record that a measurement failed at this step, or why there are none from here on."""
        if self.session is not None:
            self.session.note(self.step, off)

"""What a failing probe does to the watch, never to the run: a warning, the end of the watch, or the error itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from ntkwatch.distributed import Ranks, RanksError, TooLong
from ntkwatch.engines.memory import is_out_of_memory
from ntkwatch.guard.collectives import CollectiveError
from ntkwatch.watching.messages import log, warn

PATIENCE = 3  # failures in a row before probing is switched off
MISFIT = "pass outputs=, targets= or probes= to NTKWatch (on_error='raise' shows the traceback)"
FEWER = "pass fewer probes to NTKWatch, as probes=16, or leave it more memory (on_error='raise' shows the traceback)"
LESS = (
    "pass fewer probes to NTKWatch, as probes=16; where the process group's timeout is under 10 minutes, a longer one "
    "helps, as DDPStrategy(timeout=datetime.timedelta(minutes=10))"
)
WITHOUT = (
    "pass an outputs= to NTKWatch, a function (model, batch) -> [n, C], or a loss=, that needs no other rank, or train "
    "on one device"
)
# What is nobody's argument that does not fit: kind -> what happened, and what to do.
KINDS = {"memory": ("ran out of memory", FEWER), "time": ("failed", LESS), "collective": ("was refused", WITHOUT)}
STOPPED = "stopped"
T = TypeVar("T")
Told = tuple[str, str | None]


def told(error: BaseException) -> Told:
    """What every rank is told of an error: its type and message, and which of KINDS it is, if only by its cause."""
    kinds = (_kind(each) for each in _causes(error))
    return f"{type(error).__name__}: {error}", next((kind for kind in kinds if kind is not None), None)


def stopped(by: str) -> Told:
    """The same of work that was not finished since the run was told to stop: no failure."""
    return f"was not finished: the run was told to stop ({by})", STOPPED


def _kind(error: BaseException) -> str | None:
    if isinstance(error, CollectiveError):
        return "collective"
    if isinstance(error, TooLong):
        return "time"
    return "memory" if is_out_of_memory(error) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class ErrorPolicy:
    """One fit's failures.

    Args:
        on_error: "warn" or "raise".
        explicit: the user passed probes, outputs or targets: what does not fit them at the start raises.
        note: has the record say that a probe failed (None), or why the watch is off.

    Attributes:
        off: why probing is switched off, None while it is on.
    """

    def __init__(self, on_error: str, explicit: bool, note: Callable[[str | None], None] = lambda off: None) -> None:
        self._on_error, self._explicit, self._note = on_error, explicit, note
        self._in_a_row = 0
        self._fault: str | None = None  # of this rank alone, until all meet
        self.off: str | None = None

    def probe(self, what: str, failure: Told, error: Exception | None, start: bool) -> None:
        """A probe, or (start) what comes before the first, failed on some rank; `error` where it was this one.

        What is of KINDS is nothing that was passed and does not fit: it raises only where on_error says so. A run that
        was told to stop is no failure.
        """
        said, kind = failure
        if kind == STOPPED:
            (self.switch_off if start else log.info)(f"{what} {said}")
            return
        if self._on_error == "raise" or (start and self._explicit and kind is None):
            raise error or RuntimeError(said)
        self._in_a_row += 1
        self._tell(None)
        happened, remedy = KINDS[kind] if kind is not None else ("failed", None)
        failed = f"{what} {happened} ({said})"
        if start:
            self.switch_off(f"{failed}: {remedy or MISFIT}")
        elif self._in_a_row == PATIENCE:
            self.switch_off(f"{failed}, the {PATIENCE}rd time in a row{f': {remedy}' if remedy else ''}")
        else:
            warn(f"{failed}; training goes on")

    def beside(self, what: str, error: Exception) -> None:
        """Something that the probes do without failed."""
        if self._on_error == "raise":
            raise error
        warn(f"{what} failed ({type(error).__name__}: {error}); training goes on")

    def quietly(self, what: str, work: Callable[[], None]) -> None:
        """Do it; a failure is a warning, whatever on_error says: the run is over."""
        try:
            work()
        except Exception as error:
            warn(f"{what} failed ({type(error).__name__}: {error}); training goes on")

    def succeeded(self) -> None:
        """A probe went well."""
        self._in_a_row = 0

    def switch_off(self, why: str) -> None:
        """No more probes in this fit."""
        self.off = why
        warn(f"switched off: {why}")
        self._tell(why)

    def _tell(self, off: str | None) -> None:
        """Whatever the record meets, the run goes on."""
        self.quietly("the record of a failure", lambda: self._note(off))

    def met(self, ranks: Ranks) -> bool:
        """Whether all ranks are here and well; else all switch off."""
        if ranks.size == 1:
            return True
        try:
            failed = ranks.failed(self._fault is None)
        except Exception as error:
            self._alone(error)
            return False
        if failed:
            self.switch_off(self._fault or f"rank {', '.join(map(str, failed))} failed, and its log says why")
        return not failed

    def shared(self, ranks: Ranks, value: T, otherwise: T) -> T:
        """Rank 0's value; where another rank has gone missing, training goes on without probes.

        A rank that cannot take the value tells the others when they next meet.
        """
        try:
            return ranks.broadcast(value)
        except RanksError as error:
            self._alone(error)
        except Exception as error:
            self._fault = f"rank {ranks.rank} could not take what rank 0 sent ({type(error).__name__}: {error})"
        return otherwise

    def _alone(self, error: Exception) -> None:
        self.switch_off(f"the ranks do not answer each other ({error})")

    def instead_of_a_summary(self, last: int | None) -> str:
        """What to say of a fit without a record; last: the step of its newest measurement."""
        if last is not None:
            return (
                f"ntkwatch has measured up to step {last} and keeps no record to sum up (fast_dev_run, or a folder "
                "that cannot be written: see the warnings): the newest numbers are in .last"
            )
        if self.off is not None:
            return f"ntkwatch has measured nothing: it was switched off, {self.off}"
        return "ntkwatch has measured nothing yet: call trainer.fit, with at least one training batch."

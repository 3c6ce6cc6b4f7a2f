"""What rank 0 does for all ranks: it works alone, sends nothing, ends in time, and every rank learns how it went."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ntkwatch.distributed import Ranks, TooLong
from ntkwatch.guard.collectives import refuse_collectives
from ntkwatch.guard.interruption import ProbeEnded, pending, time_limit
from ntkwatch.watching.error_policy import ErrorPolicy, Told, stopped, told

T = TypeVar("T")


@dataclass(frozen=True)
class RankZeroResult(Generic[T]):
    """How it went: on rank 0, and what is known of that on every rank.

    Attributes:
        value, error: what the work gave, or raised; on rank 0.
        said: what rank 0 tells of the value, on every rank.
        failure: what rank 0 tells of the error, or of what stopped it, on every rank.
    """

    value: T | None = None
    error: Exception | None = None
    said: Any = None
    failure: Told | None = None


def run_on_rank_zero(
    ranks: Ranks, failures: ErrorPolicy, work: Callable[[], T], tell: Callable[[T], Any]
) -> RankZeroResult[T]:
    """Rank 0 works and tells what it has. Every rank comes here; where one does not, `failures` switches off.

    A KeyboardInterrupt or SystemExit of rank 0 goes on its way once the other ranks, which wait, know of it.
    """
    if not failures.met(ranks):
        return RankZeroResult()
    done: RankZeroResult[T] = RankZeroResult()
    if ranks.first():
        try:
            done = _tried(ranks, work, tell)
        except BaseException as stop:
            _shared(ranks, failures, RankZeroResult(failure=stopped(type(stop).__name__)))
            raise
    return _shared(ranks, failures, done)


def _tried(ranks: Ranks, work: Callable[[], T], tell: Callable[[T], Any]) -> RankZeroResult[T]:
    try:
        with _by_itself(ranks):
            value = work()
        return RankZeroResult(value, said=tell(value))
    except ProbeEnded as ended:
        by = ", ".join(pending()) or "SIGTERM"
        return RankZeroResult(error=ended.error, failure=told(ended.error) if ended.error is not None else stopped(by))
    except Exception as error:  # whatever a probe meets, the run that it watches goes on
        return RankZeroResult(error=error, failure=told(error))


@contextlib.contextmanager
def _by_itself(ranks: Ranks) -> Iterator[None]:
    if ranks.size == 1:
        yield
        return
    late = TooLong(f"it has taken {ranks.patience:g} s, and the other ranks wait no longer")
    with time_limit(ranks.patience, late), refuse_collectives():
        yield


def _shared(ranks: Ranks, failures: ErrorPolicy, done: RankZeroResult[T]) -> RankZeroResult[T]:
    said, failure = failures.shared(ranks, (done.said, done.failure), (None, None))
    return RankZeroResult(done.value, done.error, said, failure)

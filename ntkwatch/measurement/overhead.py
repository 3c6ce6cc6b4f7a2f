"""The one clock that `ntk/overhead` is read from: wall time, and what measuring takes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class OverheadClock:
    """Counts wall time since `start`, the time spent measuring, and overhead that is no measurement's ("aside").

    Args:
        now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.aside_seconds = 0.0  # overhead that no budget bounds
        self._spent = self._elapsed = 0.0  # seconds, earlier sessions of a resumed run included
        self._since: float | None = None  # the start of this session
        self._measuring_since: float | None = None

    def start(self) -> None:
        """Begin to count wall time; again after a resume. A second call does nothing."""
        if self._since is None:
            self._since = self.now()

    @property
    def is_measuring(self) -> bool:
        """Whether this is called inside `measuring`."""
        return self._measuring_since is not None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Time inside counts as spent, also when it raises; nested calls count once."""
        self.start()
        if self.is_measuring:
            yield
            return
        self._measuring_since = self.now()
        try:
            yield
        finally:
            self._spent, self._measuring_since = self.spent, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time inside is overhead, but no measurement's."""
        since = self.now()
        try:
            yield
        finally:
            self.aside_seconds += self.now() - since

    @property
    def spent(self) -> float:
        """Seconds spent measuring, the current measurement so far included."""
        return self._spent + (0.0 if self._measuring_since is None else self.now() - self._measuring_since)

    @property
    def elapsed(self) -> float:
        """Seconds of wall time since the start, earlier sessions of a resumed run included."""
        return self._elapsed + (0.0 if self._since is None else self.now() - self._since)

    @property
    def share(self) -> float:
        """Share of wall time since the start spent measuring and aside, 0 to 1."""
        elapsed = self.elapsed
        return (self.spent + self.aside_seconds) / elapsed if elapsed > 0 else 0.0

    def restore(self, spent: float, elapsed: float) -> None:
        """Go on from an earlier session; time between the two counts as neither spent nor elapsed."""
        self._spent, self._elapsed = spent, elapsed
        self._since = self._measuring_since = None

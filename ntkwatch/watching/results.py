"""What a run has left so far, for the process that it runs in and for the one that spawned or forked that."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ntkwatch.record import Measurement, RecordError, load_run
from ntkwatch.summary import summarise

SIZE = 1 << 12  # bytes: a page, and as long as a path may be


class RunResults:
    """A run's record and last measurement.

    Of a run in a process that this one has started, a page of shared memory tells where the record is, and the
    measurement is read from there. Pickled or copied for any other reason than to start a process, it has a page of its
    own. Where the machine shares no memory, or a path is longer than a page, nothing is told.
    """

    def __init__(self) -> None:
        self._record: Path | None = None
        self._last: Measurement | None = None
        self._page = _page()

    @property
    def record(self) -> Path | None:
        """The folder, None where there is none yet."""
        told = self._page.value.decode() if self._page is not None else ""
        return Path(told) if told else self._record

    @property
    def last(self) -> Measurement | None:
        """The last one, None before the first; also where it is to be read, but the record does not hold it whole."""
        record = self.record
        if record is None or record == self._record:
            return self._last
        with contextlib.suppress(RecordError):
            run = load_run(record)
            return run.measurement(run.steps[-1]) if run.steps else None
        return None

    def keep(self, record: Path | None, last: Measurement | None = None) -> None:
        """From now on the record is in this folder, and this is the last measurement."""
        self._record, self._last, told = record, last, str(record or "").encode()
        if self._page is not None:
            self._page.value = told if len(told) < SIZE else b""

    def summary(self) -> str | None:
        """The record in words, with its numbers; None without one."""
        return None if self.record is None else summarise(load_run(self.record))

    def __getstate__(self) -> dict[str, Any]:
        from multiprocessing.context import get_spawning_popen

        if get_spawning_popen() is not None:
            return self.__dict__
        return {"_record": self.record, "_last": self.last, "_page": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._page is None:
            self._page = _page()


def _page() -> Any:
    """Characters that processes share, zero-terminated; None where they cannot."""
    with contextlib.suppress(ImportError, OSError):
        from multiprocessing.sharedctypes import RawArray

        return RawArray("c", SIZE)
    return None

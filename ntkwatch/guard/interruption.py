"""What ends a probe before its end: a signal that the run answers, or ranks that will not wait any longer.

Handlers of a run save checkpoints, talk to other ranks, or requeue the job. In the middle of a probe the model is in
evaluation mode and the other ranks wait, so a signal is kept until the probe has ended, and the probe ends early.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNAL_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")  # by which schedulers and launchers stop or requeue a job
_pending: list[int] = []
_deadlines: list[tuple[float, Exception]] = []  # by time.monotonic, and what is said then; the innermost last


class ProbeEnded(BaseException):
    """Raised inside a probe, past everything that handles a model's failures. error: what went wrong, None: nothing."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(str(error or "the run has been sent a signal"))
        self.error = error


def check() -> None:
    """Ends the probe that this is called in, where there is a reason to; called before every pass of the model."""
    if _pending:
        raise ProbeEnded()
    if _deadlines and time.monotonic() > _deadlines[-1][0]:
        raise ProbeEnded(_deadlines[-1][1])


def pending() -> list[str]:
    """Names of the signals that wait."""
    return [signal.Signals(number).name for number in _pending]


@contextlib.contextmanager
def time_limit(seconds: float, otherwise: Exception) -> Iterator[None]:
    """A probe inside ends with that error when so much time has passed."""
    _deadlines.append((time.monotonic() + seconds, otherwise))
    try:
        yield
    finally:
        _deadlines.pop()


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Signals that the run has handlers for are kept, and sent again after this, in the order in which they came."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _replace_handlers()
        yield
    finally:
        _restore_handlers()
        waiting, _pending[:] = list(_pending), []
        for number in waiting:
            signal.raise_signal(number)


_handlers: dict[int, object] = {}  # number -> the run's handler


def _defer(number: int, frame: FrameType | None) -> None:
    _pending.append(number)


def _replace_handlers() -> None:
    for name in SIGNAL_NAMES:
        number = getattr(signal, name, None)
        if number is not None and callable(handler := signal.getsignal(number)):
            _handlers[number] = handler
            signal.signal(number, _defer)


def _restore_handlers() -> None:
    while _handlers:
        number, handler = _handlers.popitem()
        if signal.getsignal(number) is _defer:
            signal.signal(number, handler)  # type: ignore[arg-type]

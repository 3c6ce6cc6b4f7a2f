"""What a failing probe does to the watch, never to the run: a warning, the end of the watch, or the error itself."""

from __future__ import annotations

from collections.abc import Callable

from ntkwatch.trainer import warn

PATIENCE = 3  # failures in a row before probing is switched off


class Failures:
    """One fit's failures.

    Args:
        on_error: "warn" or "raise".
        explicit: the user passed probes, outputs or targets: what does not fit them at the start raises.

    Attributes:
        off: why probing is switched off, None while it is on.
    """

    def __init__(self, on_error: str, explicit: bool) -> None:
        self._on_error, self._explicit = on_error, explicit
        self._in_a_row = 0
        self.off: str | None = None

    def probe(self, what: str, said: str, error: Exception | None, start: bool) -> None:
        """A probe, or (start) what comes before the first, failed on some rank; `error` where it was this one."""
        if self._on_error == "raise" or (start and self._explicit):
            raise error or RuntimeError(said)
        self._in_a_row += 1
        if start:
            remedy = "pass outputs=, targets= or probes= to NTKWatch (on_error='raise' shows the traceback)"
            self.switch_off(f"{what} failed ({said}): {remedy}")
        elif self._in_a_row == PATIENCE:
            self.switch_off(f"{what} failed ({said}), the {PATIENCE}rd time in a row")
        else:
            warn(f"{what} failed ({said}); training goes on")

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

"""All loggers of one run: each measurement goes to every logger, pictures now and then, and a failure costs one logger.

On the x axis a point stands where the run's own metrics of that moment stand. On ranks other than 0 Lightning's loggers
do nothing, and neither does a `LoggerGroup`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ntkwatch.loggers import pictures
from ntkwatch.loggers.adapters import LoggerAdapter, MetricsAdapter, accepts_any_name, adapter_for
from ntkwatch.loggers.pictures import Picture, SpectrumHistory
from ntkwatch.record import Measurement

FAILURES_IN_A_ROW = 3  # after these a logger is left out: one that times out would cost its timeout each time
GROWTH = 2  # before the last, pictures are drawn when the step has grown by this factor since the latest …
SHARE = 0.01  # … and drawing takes no more than this share of wall time; the kernel of the first step waits with them
FIRST_PICTURES = 0.5  # seconds that they are expected to take, matplotlib's import included


class LoggerGroup:
    """All loggers of one run: anything with `log_metrics(metrics, step)`; `adapters` says what else is used.

    Call `start` once, `write` for each measurement, `finish` at the end. None of them raises because of a logger.

    Args:
        loggers: the run's loggers; stand-ins that accept any name are left out.
        warn: receives one sentence for each logger that fails.
        clock: seconds, monotonic.

    Attributes:
        values: the newest defined value of every tag logged so far, for `publish`.
    """

    def __init__(
        self, loggers: Sequence[object], warn: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._warn, self._clock = warn, clock
        self._began, self._drawing = clock(), 0.0
        self._loggers = [_GuardedLogger(logger, warn) for logger in loggers if not accepts_any_name(logger)]
        self._spectra = SpectrumHistory()
        self._drawn: int | None = None
        self._first: tuple[Measurement, Tensor | None, int] | None = None  # with labels and place on the x axis
        self._newest: tuple[Measurement, Tensor | None, int] | None = None
        self._can_draw = True
        self.values: dict[str, float] = {}

    def start(self, manifest: Mapping[str, Any], history: Mapping[int, Tensor] | None = None) -> None:
        """Before the first measurement; `history`: eigenvalues by step, of a resumed run's earlier measurements."""
        for step, eigenvalues in sorted((history or {}).items()):
            self._spectra.add(step, eigenvalues)
        for logger in self._loggers:
            logger.attempt("be set up", partial(logger.start, manifest))

    def write(self, m: Measurement, labels: Tensor | None = None, last: bool = False, x: int | None = None) -> None:
        """Log one measurement; pictures now and then.

        labels: the probes' raw targets, to sort the kernel by. x: where it stands on the loggers' x axis, the
        measurement's own step by default.
        """
        x = m.step if x is None else x
        self._newest = (m, labels, x)
        if not self._spectra.by_step:  # its picture waits until there is time: an early import of matplotlib would hurt
            self._first = (pictures.without_layers(m), labels, x)
        self._spectra.add(m.step, m.eigenvalues)
        self.values |= m.as_flat()
        for logger in self._loggers:
            logger.attempt(f"log step {m.step}", partial(logger.log, m, x))
        if last or (m.step >= GROWTH * (self._drawn or 0) and self._can_afford_pictures()):
            self._draw(m, labels, x)

    def finish(self) -> None:
        """Draw the last measurement if it has not been drawn, and flush every logger."""
        if self._newest is not None and self._drawn != self._newest[0].step:
            self._draw(*self._newest)
        for logger in self._loggers:
            logger.attempt("be saved", logger.adapter.save)

    def _can_afford_pictures(self) -> bool:
        expected = max(FIRST_PICTURES, 2 * self._drawing)
        return expected <= SHARE * (self._clock() - self._began)

    def _draw(self, m: Measurement, labels: Tensor | None, x: int) -> None:
        """Draw each picture once for all loggers that take pictures; an error in drawing is no logger's error."""
        self._drawn = m.step
        takers = [logger for logger in self._loggers if logger.adapter.takes_pictures]
        if not takers or not self._can_draw:
            return
        began = self._clock()
        try:
            drawn = self._pictures(m, labels, x)
        except Exception as error:
            self._can_draw = False
            self._warn(f"no pictures of the kernel could be drawn ({_message(error)}): the values are logged without.")
            return
        for logger in takers:
            logger.attempt("take pictures", partial(logger.log_pictures, drawn))
        self._drawing += self._clock() - began

    def _pictures(self, m: Measurement, labels: Tensor | None, x: int) -> list[Picture]:
        """By ascending x, as TensorBoard wants them."""
        drawn = [
            Picture("ntk/kernel", x, pictures.kernel_picture(m, labels)),
            Picture("ntk/spectra", x, pictures.spectra_picture(self._spectra.by_step, m)),
        ]
        first, self._first = self._first, None
        if first is not None and first[0].step < m.step:
            drawn.insert(0, Picture("ntk/kernel", first[2], pictures.kernel_picture(*first[:2])))
        return drawn


class _GuardedLogger:
    """One logger behind its adapter; its errors become one warning."""

    def __init__(self, logger: object, warn: Callable[[str], None]) -> None:
        self._logger, self._warn = logger, warn
        self._warned, self._failures = False, 0
        self.adapter: LoggerAdapter = MetricsAdapter(logger)  # until `start` has seen what the logger offers

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Choose the adapter and prepare the logger."""
        self.adapter = adapter_for(self._logger)
        self.adapter.start(manifest)

    def log(self, m: Measurement, x: int) -> None:
        """Log the numbers of one measurement, and flush them."""
        self.adapter.log(m, x)
        self.adapter.save()

    def log_pictures(self, drawn: Sequence[Picture]) -> None:
        """Log pictures, and flush them."""
        self.adapter.log_pictures(drawn)
        self.adapter.save()

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Run `action`. Its first error becomes this logger's warning; too many in a row leave the logger out."""
        if self._failures >= FAILURES_IN_A_ROW:
            return
        try:
            action()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{_name(self._logger)} could not {what} ({_message(error)}): training goes on and the record "
                    f"keeps every value; after {FAILURES_IN_A_ROW} failures in a row this logger is left out."
                )


def publish(values: Mapping[str, float], callback_metrics: MutableMapping[str, Any]) -> None:
    """Put `LoggerGroup.values` into `trainer.callback_metrics`, as 0-d tensors, for ModelCheckpoint and EarlyStopping.

    They stop a run when a name that they monitor is gone or NaN, hence the newest *defined* value. For the same reason
    every rank needs the values, and needs them again after each sanity check, which empties the mapping.
    """
    callback_metrics.update({tag: torch.tensor(value, dtype=torch.float64) for tag, value in values.items()})


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _name(logger: object) -> str:
    try:
        where = next((place for name in ("log_dir", "save_dir") if (place := getattr(logger, name, None))), None)
    except Exception:
        where = None
    return f"{type(logger).__name__} ({where})" if where else type(logger).__name__

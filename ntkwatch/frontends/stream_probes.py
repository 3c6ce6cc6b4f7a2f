"""The start of a watched fit: from the first batch to the probes that a stream gives, and θ_0 meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ntkwatch.diagnostics.evaluations import NO_THETA_0
from ntkwatch.frontends.trainer import Moment
from ntkwatch.measurement.initial_state import InitialState
from ntkwatch.probes import RowCollector, batches_of
from ntkwatch.watching.messages import log


class StreamProbes:
    """Looks at the batches of a fit as they come, each before it is trained on, until the baseline can be measured.

    Where the probes are known that is at the first batch. A stream gives its rows batch by batch: while they do not
    suffice the run trains on, and θ_0 is kept, so that the baseline is still that of the first step. Above 2 GB it is
    not: then a few rows must do, and the baseline is that of the step at which they are there.

    Args:
        stream: the rows that a stream has given; None where the probes are known.
        patient: whether to wait for further batches at all.
    """

    def __init__(self, stream: RowCollector | None, patient: bool = True) -> None:
        self.stream, self._patient = stream, patient and stream is not None
        self.first: Any = None  # the first batch, while nothing has been trained on
        self.start: Moment | None = None
        self._initial: InitialState | None = None
        self._fits = True

    def add(self, module: nn.Module, loader: Any, batch: Any, now: Moment) -> None:
        """One more batch of `loader`, before the module trains on it."""
        if self.stream is not None and (own := batches_of(loader, batch)[0]) is not None:
            self.stream.add(own)
        if self.start is None:
            self.first, self.start = batch, now
            self._fits = self.complete or InitialState.fits(module)
            if not self.complete:
                self._wait(module)
            return
        self.first, self.start = None, (self.start if self._fits else now)._replace(late=True)

    def _wait(self, module: nn.Module) -> None:
        assert self.stream is not None
        log.info(
            f"NTKWatch: the first batch of this stream has {len(self.stream)} rows: probes are gathered as it is read, "
            f"up to {self.stream.n}; "
            + ("the first kernel is still that of the first step" if self._fits else NO_THETA_0)
        )
        if self._fits:
            self._initial = InitialState(module)

    @property
    def complete(self) -> bool:
        """Whether to wait no longer."""
        if self.stream is None or not self._patient:
            return True
        return self.stream.complete or (self.stream.enough and not self._fits)

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the module is at the step where the baseline stands."""
        if self._initial is None or self.start is None or not self.start.late:
            yield
            return
        with self._initial.restored():
            yield

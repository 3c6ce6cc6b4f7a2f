"""Before the first measurement of a fit: probes, session, and the baseline or the record of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ntkwatch.distributed import Ranks
from ntkwatch.frontends.session_setup import SessionSetup
from ntkwatch.frontends.stream_probes import StreamProbes
from ntkwatch.frontends.trainer import Moment, calibration, true_precision
from ntkwatch.watching.messages import log
from ntkwatch.watching.session import Session, keeps_probes


class BaselineSetup:
    """On rank 0, one call after the other: `prepare`, `add` for each batch until there is a `start`, `begin`.

    Args:
        opening: opens the session, as soon as there are probes.
        restored: the callback's state, in a resumed run.
        why_not: why a resumed run does not go on from its state, where it does not.
    """

    def __init__(self, opening: SessionSetup, restored: Mapping[str, Any] | None, why_not: str | None) -> None:
        self._opening, self._restored, self._why_not = opening, restored, why_not
        self._state: Mapping[str, Any] | None = (restored or {}).get("session")
        self._gathering: StreamProbes | None = None
        self.session: Session | None = None
        self.continued = False  # an earlier record

    def prepare(self) -> None:
        """The session, if the probes can be had before training."""
        self.session = self._opening.before_training()
        patient = not self._opening.trial and (self._state is None or not keeps_probes(self._state))
        self._gathering = StreamProbes(self._opening.stream() if self.session is None else None, patient)

    def add(self, batch: Any, now: Moment) -> None:
        """A batch, before the run trains on it."""
        assert self._gathering is not None
        self._gathering.add(self._opening.pl_module, self._opening.trainer.train_dataloader, batch, now)

    def start(self, waits: bool) -> Moment | None:
        """Where the baseline stands, once it can be measured; what there is must do where nobody waits for more."""
        gathering = self._gathering
        return None if gathering is None or (waits and not gathering.complete) else gathering.start

    def at_start(self) -> AbstractContextManager[None]:
        """Inside, the module is where the baseline stands."""
        return nullcontext() if self._gathering is None else self._gathering.at_start()

    def begin(self, ranks: Ranks) -> None:
        """Probes, engine and BatchNorm's statistics, or the record of a resumed run; raises TooLong where a probe is
        more than the ranks can wait for."""
        assert self._gathering is not None
        with self.at_start():
            if self.session is None:
                assert self._gathering.stream is not None
                self.session = self._opening.from_stream(self._gathering.stream, self._state)
            with true_precision(self._opening.trainer):
                self.continued = self.session.continue_record(self._restored, self._why_not)
                if not self.continued:
                    first, probes = self._gathering.first, self.session.monitor.probes
                    self.session.begin(calibration(self._opening.trainer, first, probes))
                    ranks.foresee(self.session.foreseen, len(probes))
        for line in self.session.introduction():
            log.info(f"NTKWatch: {line}")

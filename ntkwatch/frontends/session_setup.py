"""The session of a fit: from a Trainer and the user's settings to probes, monitor, record and loggers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ntkwatch import probes as probing
from ntkwatch.frontends.record_place import place_of
from ntkwatch.frontends.trainer import as_in_training, hyperparameters, probe_loader
from ntkwatch.guard import leave_no_trace
from ntkwatch.measurement.overhead import OverheadClock
from ntkwatch.model import Batch, Network, as_batch
from ntkwatch.model.batch_reading import Signature
from ntkwatch.model.wrappers import unwrap
from ntkwatch.probes import MIN_PROBES, ProbeSet, RowCollector
from ntkwatch.watching.messages import warn
from ntkwatch.watching.session import Session, stored_probes
from ntkwatch.watching.settings import Settings
from ntkwatch.watching.setup import make_session

TRIAL = 4  # probes under fast_dev_run


@dataclass(frozen=True)
class SessionSetup:
    """One fit, about to be watched. trial: under `fast_dev_run`, few probes and nothing written."""

    settings: Settings
    trainer: Any
    pl_module: Any
    trial: bool
    clock: OverheadClock

    @property
    def _n(self) -> int:
        return min(self.settings.wanted.n, TRIAL) if self.trial else self.settings.wanted.n

    def before_training(self) -> Session | None:
        """The session, if the probes can be had already; None where the data only streams."""
        probes = self._choose(self.settings.seed)
        return self._open(probes) if probes is not None else None

    def stream(self) -> RowCollector:
        """What gathers the probes of a stream."""
        network = Network(self.pl_module, self.settings.monitor["outputs"])
        return RowCollector(self._n, partial(_settled, network))

    def from_stream(self, stream: RowCollector, state: Mapping[str, Any] | None) -> Session:
        """The session on the first rows of the stream, or on the rows that the record of a resumed run keeps."""
        targets, kept = self.settings.targets, None
        if state is not None:
            kept = stored_probes(state, stream.probes(), targets)
        return self._open(kept or stream.probes(targets), streamed=True)

    def _choose(self, seed: int) -> ProbeSet | None:
        settings = self.settings
        if settings.wanted.data is not None:
            return probing.as_probe_set(settings.wanted.data, settings.targets)
        source, loader = probe_loader(self.trainer, settings.wanted.split)
        if source == "val" and settings.wanted.split is None and probing.is_streaming(loader):
            source, loader = probe_loader(self.trainer, "train")
        if probing.is_streaming(loader):
            return None
        leading = Signature.of(unwrap(self.pl_module)).leading
        return probing.choose_probes(
            loader, self._n, seed=seed, source=source, targets=settings.targets, leading=leading
        )

    def _open(self, probes: ProbeSet, streamed: bool = False) -> Session:
        settings, trainer = self.settings, self.trainer
        hparams = hyperparameters(trainer, settings.hparams)
        self._tell_if_few(probes)
        place = None if self.trial else place_of(trainer)
        if place is not None and place.said is not None:
            warn(place.said)
        loggers = trainer.loggers if settings.loggers is None else settings.loggers
        return make_session(
            settings,
            self.pl_module,
            probes if streamed else as_in_training(trainer, probes, settings.seed),
            self.clock,
            folder=place.folder if place is not None else None,
            is_log=place is not None and place.is_log,
            loggers=[] if self.trial else loggers,
            optimizers=trainer.optimizers,
            hparams=hparams,
            save_probes=probes if streamed else None,
            fresh=self._fresh if settings.resample else None,
        )

    def _tell_if_few(self, probes: ProbeSet) -> None:
        wanted = self.settings.wanted
        if wanted.data is None and not self.trial and len(probes) < min(MIN_PROBES, wanted.n):
            warn(
                f"there are only {len(probes)} probes ({probes.how}), and the angle between so small kernels says "
                "little: pass a batch of more examples, as NTKWatch(probes=next(iter(DataLoader(dataset, 64))))"
            )

    def _fresh(self, step: int) -> ProbeSet:
        probes = self._choose(self.settings.seed + 1_000_003 * (step + 1))
        if probes is None:
            raise ValueError("resample=True needs a dataset that can be indexed; this loader only streams")
        return as_in_training(self.trainer, probes, self.settings.seed)


def _settled(network: Network, batch: Any) -> Batch:
    """A batch of a stream, whose leaves that all examples share are told apart; by shape where it does not run."""
    try:
        with leave_no_trace(network.module):
            return network.batch(batch)
    except Exception:  # whoever measures the probes says so
        return as_batch(batch)

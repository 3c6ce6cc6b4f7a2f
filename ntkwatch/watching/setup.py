"""From a user's settings and probes to a session: what every front end does once the probes are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ntkwatch.loggers.group import LoggerGroup
from ntkwatch.measurement.manifest import optimizers as optimizer_names
from ntkwatch.measurement.monitor import Monitor
from ntkwatch.measurement.overhead import OverheadClock
from ntkwatch.probes import ProbeSet
from ntkwatch.watching.messages import warn
from ntkwatch.watching.session import Session
from ntkwatch.watching.settings import Settings


def make_session(
    settings: Settings,
    model: nn.Module,
    probes: ProbeSet,
    clock: OverheadClock,
    *,
    folder: Path | None,
    is_log: bool,
    loggers: Sequence[Any],
    optimizers: Sequence[Any],
    hparams: Mapping[str, Any],
    save_probes: ProbeSet | None = None,
    fresh: Callable[[int], ProbeSet] | None = None,
) -> Session:
    """A session whose monitor, record and loggers are those of the settings.

    Args:
        clock: the schedule's, which `ntk/overhead` is read from.
        folder: of the record; None writes nothing.
        is_log: whether that folder was named, by a logger or by the user.
        save_probes, fresh: see `Session`.
    """
    monitor = Monitor(model, probes, hparams=hparams, **settings.monitor)
    monitor.clock = clock
    return Session(
        monitor,
        folder,
        LoggerGroup(loggers, warn),
        is_log=is_log,
        warn=warn,
        save_kernels=settings.save_kernels,
        save_probes=save_probes,
        fresh=fresh,
        extra={
            **optimizer_names(optimizers),
            "every": settings.every if isinstance(settings.every, (str, int)) else repr(settings.every),
            "budget": settings.budget,
        },
    )

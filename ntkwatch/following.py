"""Following a Trainer's run for the linear forecast: every batch, at the rates that its optimizer stepped with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkwatch.baseline import NO_THETA_0
from ntkwatch.diagnostics import names_forecast
from ntkwatch.forecast import LinearForecast, Rates
from ntkwatch.monitor import Monitor
from ntkwatch.opening import Settings
from ntkwatch.record import RecordError, load_tensors, save_tensors
from ntkwatch.session import Session
from ntkwatch.trainer import log, warn

FILE = "forecast"
NOT_NAMED = (
    "the forecast costs about two training steps for each of the run's: ask for it by name, as in "
    "diagnostics=['full', 'loss_if_lazy', 'forecast_error']"
)
SAID = "the linear forecast adds about two training steps to each of the run's: in ntk/overhead, outside budget="


class Follower:
    """Gives a monitor its linear forecast and feeds it; what cannot be followed makes the forecast's numbers undefined.

    Call `stepping` before the optimizer steps and `batch` after each training batch. An error ends the forecast with a
    reason and is handed to `failed`, with what failed.

    Args:
        trainer, module: of a Lightning fit, at θ_0 or where the checkpoint of `resumed` was written.
        monitor: started, or restored; its forecast is set.
        targets: callable (batch) -> targets, where they are not the batch's own.
        resumed: what `state` returned.
        folder: of the record that `resumed` is kept in.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        monitor: Monitor,
        *,
        targets: Callable[[Any], Tensor] | None = None,
        resumed: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._trainer, self._monitor, self._failed = trainer, monitor, failed
        self._rates: list[Rates] = []
        self._forecast: LinearForecast | None = None
        if (reason := why_not(trainer, module)) is not None:
            self._end(reason)
            return
        try:
            self._forecast = monitor.forecast = _forecast(trainer.optimizers[0], monitor, targets, resumed, folder)
        except (ValueError, RecordError) as error:
            self._end(str(error))

    def stepping(self) -> None:
        """The optimizer is about to step: the rates that it steps with, before a scheduler changes them."""
        if self._forecast is not None:
            self._rates.append(self._forecast.rates())

    def batch(self, batch: Any, outputs: Any, stepped: bool) -> None:
        """The run is done with a batch. outputs: what training_step returned, empty for a batch that it skipped."""
        if self._forecast is None:
            return
        try:
            if outputs is not None and outputs != {}:
                self._forecast.add(batch, 1 / self._trainer.accumulate_grad_batches)
            if stepped:
                self._step()
        except Exception as error:  # whatever the linear model meets, the run goes on
            self._end(f"the forecast ended at step {self._trainer.global_step} ({type(error).__name__}: {error})")
            self._failed("the linear forecast", error)

    def _step(self) -> None:
        assert self._forecast is not None
        rates, self._rates = self._rates, []
        if len(rates) != 1:
            raise ValueError(f"the optimizer stepped {len(rates)} times on one batch")
        self._forecast.apply(rates[0], clipping(self._trainer))

    def state(self, folder: Path | None) -> dict[str, str] | None:
        """For a checkpoint; the tensors go beside the record, where the newest checkpoint's replace the others'."""
        if self._forecast is None or folder is None:
            return None
        try:
            return {"sha256": save_tensors(folder, FILE, self._forecast.tensors())}
        except OSError as error:
            warn(f"the forecast is not in the checkpoint ({type(error).__name__}: {error})")
            return None

    def _end(self, reason: str) -> None:
        self._forecast, self._monitor.forecast = None, reason


def follow(
    trainer: Any,
    module: Any,
    session: Session,
    settings: Settings,
    earlier: Mapping[str, Any] | None,
    failed: Callable[[str, Exception], None],
) -> Follower | None:
    """A follower where a diagnostic that needs one was asked for by name; else the monitor is told why there is none.

    earlier: the callback's state, where the session has just resumed it.
    """
    if not names_forecast(settings.monitor["diagnostics"]):
        session.monitor.forecast = NOT_NAMED
        return None
    log.info(f"NTKWatch: {SAID}")
    return Follower(
        trainer,
        module,
        session.monitor,
        targets=settings.targets if callable(settings.targets) else None,
        resumed=((earlier or {}).get("session") or {}).get("forecast"),
        folder=session.record,
        failed=failed,
    )


def why_not(trainer: Any, module: Any) -> str | None:
    """Why the batches of this fit do not make a linear model's steps, None where they do."""
    if trainer.world_size > 1:
        return f"the forecast follows the batches of one process and this run has {trainer.world_size}"
    if not module.automatic_optimization:
        return "the forecast cannot tell which batches make a step under manual optimization"
    if len(trainer.optimizers) != 1:
        return f"the forecast follows one optimizer and this run has {len(trainer.optimizers)}"
    own = next(c for c in type(module).__mro__ if "configure_gradient_clipping" in vars(c))
    if own.__name__ not in ("LightningModule", "_Scaled"):  # an output-scale twin clips only where the trainer does
        return f"the forecast cannot follow {own.__name__}.configure_gradient_clipping"
    if own.__name__ == "_Scaled" and trainer.gradient_clip_val:
        return "the forecast cannot follow the clipping of an output-scale twin"
    return None


def clipping(trainer: Any) -> Callable[[Sequence[Tensor]], None] | None:
    """The trainer's own clipping of gradients as a function of parameters, None where it clips nothing."""
    value = trainer.gradient_clip_val
    if not value:
        return None
    by_value = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value"
    clip: Any = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
    return lambda parameters: clip(parameters, value)


def _forecast(
    optimizer: torch.optim.Optimizer,
    monitor: Monitor,
    targets: Callable[[Any], Tensor] | None,
    resumed: Mapping[str, Any] | None,
    folder: Path | None,
) -> LinearForecast:
    network, base = monitor.network, monitor.baseline
    start: Mapping[str, Tensor] | None = {**network.parameters, **monitor.statistics}
    tensors = None
    if base is not None:
        if not resumed or folder is None:
            raise ValueError("the forecast is not in the checkpoint, and it needs every batch since the baseline")
        start, tensors = base.state(network.device), load_tensors(folder, FILE, resumed["sha256"])
    if start is None:
        raise ValueError(NO_THETA_0)
    loss = None if isinstance(monitor.loss, str) else monitor.loss
    return LinearForecast(network, optimizer, loss, targets=targets, start=start, resumed=tensors)

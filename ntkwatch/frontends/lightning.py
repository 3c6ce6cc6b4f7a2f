"""NTKWatch: when → measure → loggers, inside a Lightning Trainer. Sequencing only, no arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntkwatch.distributed import Ranks, sharded
from ntkwatch.frontends.baseline_setup import BaselineSetup
from ntkwatch.frontends.continuation import Continuation
from ntkwatch.frontends.forecast_updates import ForecastUpdates, start_forecast
from ntkwatch.frontends.session_setup import SessionSetup
from ntkwatch.frontends.trainer import Moment, import_names, now, show_columns, stays_out, true_precision
from ntkwatch.loggers.group import publish
from ntkwatch.measurement.arguments import check_choice
from ntkwatch.record import Measurement
from ntkwatch.watching.checkpoint import VERSION
from ntkwatch.watching.results import RunResults
from ntkwatch.watching.runner import MeasurementRunner, Work
from ntkwatch.watching.schedule import Schedule
from ntkwatch.watching.session import Session
from ntkwatch.watching.settings import Settings

if TYPE_CHECKING or not (loaded := import_names()):
    from pytorch_lightning import Callback
else:  # of the import names that the run uses already: a second copy of the package would cost seconds
    Callback = type("Callback", tuple(sys.modules[name].Callback for name in loaded), {})


class NTKWatch(Callback):
    """Watch the empirical NTK of the model during `trainer.fit`.

    Args:
        probes: how many validation (else training) examples to watch, class-balanced; or "val", "train", a tensor,
            a batch, a ProbeSet.
        every: "log" (0 and round(2^(k/4))), a number of steps, a list of steps, or a function of the step.
        budget: share of wall time that probing may take, beyond 5 s in all that are free; None: no limit.
        reduction: "trace", "sum", "blocks" or "full".
        engine: "auto", "layerwise" or "functional".
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.
        targets: None (from the batch), a tensor for the probes, or a callable of the batch.
        loss: callable (outputs, targets) -> mean loss, for the diagnostics that need one.
        diagnostics: "default", "full" or a list of names and presets; linear forecast and sign descent by name alone.
        resample: fresh probes at every measurement, θ_0 and θ_t both evaluated on them.
        save_kernels: keep every kernel in the record, not only the first.
        on_error: "warn" or "raise": what a failing probe does in mid-run.
        loggers: None for the trainer's, [] for the record alone, or a list of Lightning loggers.
        hparams: kept in the record beside the module's own `hparams`; {"width": 256} feeds `ntkwatch widths`.
        seed: of the probe choice and the label permutations; the run's own generators are never touched.

    Raises:
        ValueError: an argument of an unknown value, at construction.
    """

    state_key: str = "NTKWatch"

    def __init__(
        self,
        probes: Any = 64,
        every: int | Sequence[int] | Callable[[int], bool] | str = "log",
        budget: float | None = 0.02,
        reduction: str = "trace",
        engine: str = "auto",
        outputs: Callable[[torch.nn.Module, Any], Any] | None = None,
        targets: Callable[[Any], Any] | Tensor | None = None,
        loss: Callable[[Tensor, Tensor], Any] | None = None,
        diagnostics: Sequence[str] | str = "default",
        resample: bool = False,
        save_kernels: bool = True,
        on_error: str = "warn",
        loggers: Sequence[Any] | None = None,
        hparams: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("on_error", on_error, ("warn", "raise"))
        self._settings = Settings.checked(
            probes, every, budget, seed, outputs=outputs, targets=targets, loss=loss, reduction=reduction,
            engine=engine, diagnostics=diagnostics, resample=resample, save_kernels=save_kernels,
            loggers=loggers, hparams=hparams,
        )  # fmt: skip
        self._on_error, self._results = on_error, RunResults()
        self._earlier = Continuation()
        self._forget()

    def _forget(self) -> None:
        """A clean slate for one fit; a checkpoint's state is loaded after this."""
        self._earlier.begin()
        self._results.keep(None)
        self._runner = MeasurementRunner(self._settings, self._on_error, self._results)
        self._forecast_updates: ForecastUpdates | None = None
        self._restored: dict[str, Any] | None = None
        self._global_step = 0
        self._beginning: BaselineSetup | None = None  # until the baseline is measured
        self._trial = self._completed = False
        self._hide_columns: Callable[[], None] | None = None

    @property
    def schedule(self) -> Schedule:
        """When to measure, and what that has taken."""
        return self._runner.schedule

    @property
    def record(self) -> Path | None:
        """The folder of this run's record, None before fit; after ddp_spawn too, in the process that called fit."""
        return self._results.record

    @property
    def last(self) -> Measurement | None:
        """The last Measurement (on rank 0), None before the first; after ddp_spawn, what the record holds of it."""
        return self._results.last

    # ── Lightning's hooks ─────────────────────────────────────────────────────────────────────────────────────────
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A new fit: nothing of an earlier one is left."""
        if stage != "fit":
            return
        self._forget()
        self._trial = bool(trainer.fast_dev_run)
        if (reason := stays_out(trainer, self)) is not None:
            self._runner.failures.switch_off(reason)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Choose the probes, look at the model; what was passed explicitly and does not fit raises here."""
        if self._runner.is_on and (reason := sharded(pl_module)) is not None:
            self._runner.failures.switch_off(
                f"{reason}; sharded parameters cannot be measured yet: use DDP or one device"
            )
        if not self._runner.is_on:
            return
        self._runner.ranks = Ranks.detect()
        if not self._runner.shared_schedule.settle(self._runner.ranks, self._runner.failures):
            return
        self._runner.step = self._global_step = trainer.global_step
        self._restored = self._earlier.settle(trainer, pl_module, self._runner.ranks, self._runner.failures)
        if self._restored is not None:
            self._runner.step = self._runner.measured_at = self._restored["step"]
            self.schedule.load_state_dict(self._restored["schedule"])
            self._runner.shared_schedule.load_state_dict(self._restored["grid"])
            self._runner.values.update(self._restored["values"])
            publish(self._runner.values, trainer.callback_metrics)  # EarlyStopping may ask before the next probe
        if not self._runner.is_on:
            return  # a rank did not answer
        self._runner.start()
        self._hide_columns = show_columns(trainer, self._runner.values)
        opening = SessionSetup(self._settings, trainer, pl_module, self._trial, self.schedule.clock)
        self._beginning = BaselineSetup(opening, self._restored, self._earlier.why)
        self._together(trainer, "the look at model and probes", self._beginning.prepare, start=True)
        self._runner.session = self._beginning.session

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """K_0, before the first training step; later, though at θ_0, where a stream gives its probes batch by batch."""
        if not self._runner.is_on or self._beginning is None:
            return
        look = partial(self._beginning.add, batch, now(trainer, self._runner.step))
        self._together(trainer, "gathering the probes", look, start=True)
        if self._runner.is_on:
            self._begin(trainer, pl_module, self._beginning, waits=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """What a stream has given in a whole epoch is what there is."""
        if self._runner.is_on and self._beginning is not None:
            self._begin(trainer, pl_module, self._beginning, waits=False)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """For the linear forecast: a scheduler changes the learning rates of this step before the batch ends."""
        if self._forecast_updates is not None:
            self._forecast_updates.stepping(optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count optimizer-stepping batches; measure where the schedule says so."""
        if self._runner.session is not None:
            self._runner.session.renew()
        stepped = trainer.global_step != self._global_step
        if self._forecast_updates is not None and self._runner.is_on:
            with self.schedule.aside(), true_precision(trainer):
                self._forecast_updates.batch(batch, outputs, stepped)
        if not stepped:
            return  # gradients are being accumulated
        self._global_step = trainer.global_step
        self._runner.step += 1
        if self._beginning is None and not self._trial and self._runner.is_due():
            # Lightning counts this batch only after its hooks, and what it logs of the next one stands there.
            self._probe(trainer, now(trainer, self._runner.step, batches=1))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last step is always measured."""
        self._completed = True
        if self._runner.is_on and not self._trial and self._runner.measured_at not in (None, self._runner.step):
            self._probe(trainer, now(trainer, self._runner.step), last=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the model and of θ_0."""
        if stage != "fit":
            return
        if self._hide_columns is not None:
            self._runner.failures.quietly("the progress bar", self._hide_columns)
            self._hide_columns = None  # a closure: the callback stays picklable
        if self._runner.session is not None:
            self._runner.finish(self._completed)
            self._earlier.keep(self.state_dict(), pl_module)  # for the next fit, and `trainer.save_checkpoint`
            self._runner.session = None
        self._beginning = None
        if self._forecast_updates is not None:
            self._forecast_updates.close()
            self._forecast_updates = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only, under 1 MB."""
        return {
            "version": VERSION,
            "step": self._runner.step,
            "schedule": self.schedule.state_dict(),
            "grid": self._runner.shared_schedule.state_dict(),
            "values": dict(self._runner.values),
            "session": self._state(self._runner.session) if self._runner.session is not None else self._earlier.session,
        }

    def _state(self, session: Session) -> dict[str, Any]:
        forecast = (
            self._forecast_updates.state(session.record)
            if self._forecast_updates is not None and session.begun
            else None
        )
        return session.state() | ({"forecast": forecast} if forecast else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record of the run that the checkpoint is from, if the state is one that can be used."""
        self._earlier.load(state_dict)

    def summary(self) -> str:
        """The run in words, with its numbers, as `ntkwatch show` tells it; or why there is nothing to tell."""
        return self._runner.summary()

    # ── one probe ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _probe(self, trainer: Any, at: Moment, last: bool = False) -> None:
        self._runner.measure(partial(self._measure, trainer, at, last), last, **self._hooks(trainer))

    def _together(self, trainer: Any, what: str, work: Work, start: bool = False, step: int | None = None) -> None:
        self._runner.run(what, work, start, step, **self._hooks(trainer))

    @staticmethod
    def _hooks(trainer: Any) -> dict[str, Any]:
        """What the runner asks of a Trainer, and tells it."""
        return {
            "must_end": lambda: trainer.received_sigterm,
            "learn": lambda values: publish(values, trainer.callback_metrics),
        }

    def _measure(self, trainer: Any, at: Moment, last: bool = False) -> Measurement:
        assert self._runner.session is not None
        optimizers = trainer.optimizers
        with true_precision(trainer):
            return self._runner.session.probe(
                at.step,
                last=last,
                x=at.x,
                optimizer=optimizers[0] if len(optimizers) == 1 and not at.late else None,
                global_step=at.global_step,
                epoch=at.epoch,
            )

    # ── the baseline ──────────────────────────────────────────────────────────────────────────────────────────────
    def _begin(self, trainer: Any, pl_module: Any, beginning: BaselineSetup, waits: bool) -> None:
        """K_0 and all that is done once, if rank 0 has the probes for it."""
        settled = self._runner.failures.shared(self._runner.ranks, beginning.start(waits), None)
        if settled is None:
            return
        start, self._beginning = Moment(*settled), None

        def baseline() -> Measurement:
            self.schedule.due(start.step)
            with beginning.at_start():
                return self._measure(trainer, start)

        self._together(trainer, "settling the baseline", partial(beginning.begin, self._runner.ranks), start=True)
        self._runner.session = beginning.session
        continued = self._runner.failures.shared(self._runner.ranks, beginning.continued, False)
        if self._runner.session is not None:
            self._results.keep(self._runner.session.record)
        if self._runner.is_on:
            fit = (trainer, pl_module, self._runner.session, self._settings, self._restored if continued else None)
            self._forecast_updates = start_forecast(*fit, self._runner.ranks, self._runner.failures, start.late)
        if self._runner.is_on and not continued:
            if self._restored is None:
                self._runner.shared_schedule.due(start.step)
            self._together(trainer, "the baseline probe", baseline, True, start.step)
        if self._runner.is_on and self._runner.session is not None:
            self._runner.session.warn_of_missing_forecast()

"""The updates of the linear forecast beside a Trainer's run: every batch of every rank, at its optimizer's rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ntkwatch.diagnostics import names_forecast
from ntkwatch.diagnostics.evaluations import NO_THETA_0
from ntkwatch.distributed import Ranks, RanksError
from ntkwatch.frontends.forecast_support import clipping, why_not
from ntkwatch.frontends.trainer import true_precision
from ntkwatch.linearized.forecast import LinearForecast, Stepped
from ntkwatch.linearized.optimizer_copy import NotRepeatable
from ntkwatch.measurement.monitor import Monitor
from ntkwatch.model import Network
from ntkwatch.probes import content_hash
from ntkwatch.record import FORECASTS, RecordError, TensorStore
from ntkwatch.watching.error_policy import ErrorPolicy
from ntkwatch.watching.messages import log, warn
from ntkwatch.watching.session import Session
from ntkwatch.watching.settings import Settings

NOT_NAMED = (
    "the forecast costs two to three training steps for each of the run's: ask for it by name, as in "
    "diagnostics=['full', 'loss_if_lazy', 'forecast_error']"
)
SAID = "the linear forecast adds two to three training steps to each of the run's: in ntk/overhead, outside budget="
NOT_SAVED = "the forecast is not in the checkpoint, and it needs every batch since the baseline"
LATE = (
    "the forecast needs every batch since the baseline, and the probes of this stream were there only some batches "
    "later: pass a batch as probes="
)
OTHER_WEIGHTS = "the weights are not those that the checkpoint's forecast was saved beside"


class ForecastUpdates:
    """Feeds a linear forecast on one rank of a fit; what cannot be followed ends it on all of them, with a reason.

    Call `stepping` before the optimizer steps and `batch` after each training batch, on every rank: each optimizer step
    is one all-reduce of the ranks' gradients and of what went wrong on them, so that all end or none. Why it ended is
    told to `end`, in words; an error is handed to `failed` as well, with what failed.
    """

    def __init__(
        self,
        trainer: Any,
        forecast: LinearForecast,
        ranks: Ranks,
        *,
        end: Callable[[str], None],
        failed: Callable[[str, Exception], None],
    ) -> None:
        self._trainer, self._ranks = trainer, ranks
        self._tell, self._failed = end, failed
        self._forecast: LinearForecast | None = forecast
        self._stepped: Stepped | None = None  # how the optimizer did, on this batch
        self._error: Exception | None = None  # of this rank; the others learn of it at the next step
        self._hooks: list[Any] = []
        self._saved: dict[str, str] | None = None

    # ── batch by batch ────────────────────────────────────────────────────────────────────────────────────────────
    def stepping(self, optimizer: Any) -> None:
        """The optimizer is about to step. Hooks, there for this step alone, see with what and whether it does."""
        if self._forecast is not None:
            self._try(partial(self._watch, self._forecast, optimizer))

    def batch(self, batch: Any, outputs: Any, stepped: bool) -> None:
        """The run is done with a batch. outputs: what training_step returned, empty for a batch that it skipped."""
        self._unhook()
        if self._forecast is not None and outputs is not None and outputs != {}:
            self._try(partial(self._forecast.add, batch, 1 / self._trainer.accumulate_grad_batches))
        if self._forecast is not None and stepped:
            self._step(self._forecast)
        if self._forecast is not None and self._error is not None and self._ranks.size == 1:
            self._over(self._error)  # alone there is nobody to wait for

    def _watch(self, forecast: LinearForecast, optimizer: Any) -> None:
        self._unhook()
        self._once()
        if (reason := forecast.lost(optimizer)) is not None:
            raise NotRepeatable(reason)
        before = forecast.rates()

        def after(*_: Any) -> None:  # of a class that steps by its parent's step as well: the last call is the whole's
            self._try(lambda: setattr(self, "_stepped", forecast.stepped(before)))

        again = optimizer.register_step_pre_hook(lambda *_: self._try(self._once))
        self._hooks = [again, optimizer.register_step_post_hook(after)]

    def _once(self) -> None:
        if self._stepped is not None:
            raise NotRepeatable("the optimizer stepped more than once on one batch")

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _step(self, forecast: LinearForecast) -> None:
        """What all ranks have, in one collective; then all step, or none does."""
        stepped, self._stepped = self._stepped, None
        ok, count = self._error is None, int(stepped is not None)
        try:
            joined = self._ranks.join(forecast.gradients, forecast.parameters, ok=ok, count=count)
        except RanksError as error:
            self._over(self._error or error)
            return
        if joined.failed:
            where = ", ".join(map(str, joined.failed))
            self._over(self._error or RuntimeError(f"it failed on rank {where}, whose log says why"))
        elif stepped is None and joined.count == 0:
            forecast.discard()  # the run's optimizer was skipped: by a gradient scaler, or by the module
        elif stepped is None or joined.count != self._ranks.size:
            self._over(NotRepeatable(f"the optimizer stepped on {joined.count} of {self._ranks.size} ranks"))
        else:
            self._try(partial(self._apply, forecast, joined.gradients, stepped))

    def _apply(self, forecast: LinearForecast, gradients: Mapping[str, Tensor | None], stepped: Stepped) -> None:
        self._saved = None
        forecast.gradients = dict(gradients)
        forecast.apply(stepped, clipping(self._trainer))

    def _try(self, work: Callable[[], Any]) -> None:
        """Whatever the linear model meets, the run goes on; `batch` ends the forecast, outside the optimizer's step."""
        if self._error is not None:
            return
        try:
            work()
        except Exception as error:
            self._error = error
            self._say(error)

    def _over(self, error: Exception) -> None:
        self._say(error)
        self.close()
        if not isinstance(error, NotRepeatable):
            self._failed("the linear forecast", error)
        elif self._ranks.first():
            warn(f"the linear forecast has ended: {error}")  # the run's own doing, and no failure

    def _say(self, error: Exception) -> None:
        kind = "" if isinstance(error, NotRepeatable) else f"{type(error).__name__}: "
        self._tell(f"the forecast ended at step {self._trainer.global_step} ({kind}{error})")

    def close(self) -> None:
        """Stop updating the forecast."""
        self._unhook()
        self._forecast = None

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────
    def state(self, folder: Path | None) -> dict[str, str] | None:
        """For a checkpoint: a name and checksums; the tensors go into a store beside the record in `folder`."""
        forecast = self._forecast
        if forecast is None or self._error is not None or folder is None:
            return None
        try:
            if forecast.moved() is not None:  # in the middle of a batch, say
                return None
            if self._saved is None:
                kept = TensorStore(folder / FORECASTS).put(self._trainer.global_step, forecast.tensors())
                self._saved = kept | {"weights": content_hash(forecast.network.parameters)}
            return self._saved
        except Exception as error:  # a checkpoint is the run's, and saved whatever becomes of the forecast
            warn(f"the forecast is not in the checkpoint ({type(error).__name__}: {error})")
            return None


def start_forecast(
    trainer: Any,
    module: Any,
    session: Session | None,
    settings: Settings,
    earlier: Mapping[str, Any] | None,
    ranks: Ranks,
    failures: ErrorPolicy,
    late: bool = False,
) -> ForecastUpdates | None:
    """Forecast updates on every rank where a diagnostic that needs them was asked for by name; else the monitor says
    why there are none.

    Call it on every rank, at θ_0 or where the checkpoint of `earlier` was written.

    Args:
        session: rank 0's; None elsewhere.
        earlier: the callback's state, where the session has just resumed it.
        failures: are told of what goes wrong later; they switch off where a rank does not come.
        late: batches were trained on since the baseline.
    """

    def end(reason: str) -> None:
        if session is not None:
            session.monitor.forecast = reason

    if not names_forecast(settings.monitor["diagnostics"]):
        end(NOT_NAMED)
        return None
    if late:
        end(LATE)
        return None
    if ranks.first():
        log.info(f"NTKWatch: {SAID}")
    try:
        begun = ranks.broadcast(_begun(session, earlier) if session is not None else NOT_SAVED)
        forecast = begun if isinstance(begun, str) else _made(trainer, module, settings, begun)
        lacking = ranks.failed(not isinstance(forecast, str))
    except RanksError as error:
        failures.switch_off(f"the ranks do not answer each other ({error})")
        return None
    if isinstance(forecast, str) or lacking:
        end(forecast if isinstance(forecast, str) else f"the forecast could not be made on rank {lacking[0]}")
        return None
    if session is not None:
        session.monitor.forecast = forecast
    return ForecastUpdates(trainer, forecast, ranks, end=end, failed=failures.beside)


Begun = tuple[dict[str, Tensor], dict[str, Tensor] | None, str | None]


def _begun(session: Session, earlier: Mapping[str, Any] | None) -> Begun | str:
    """Where the linear model starts, or why that is not known: θ_0 and statistics, what it has become since, and the
    hash of the run's weights when it had."""
    monitor: Monitor = session.monitor
    if monitor.baseline is None:
        return dict(monitor.statistics), None, None  # θ_0 is what every rank has
    start = monitor.baseline.state(monitor.network)
    kept = ((earlier or {}).get("session") or {}).get("forecast")
    if start is None:
        return NO_THETA_0
    if not kept or session.record is None:
        return NOT_SAVED
    try:
        return start, TensorStore(session.record / FORECASTS).get(kept), kept["weights"]
    except (RecordError, KeyError, TypeError) as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:
        return f"the checkpoint's forecast could not be read ({type(error).__name__}: {error})"


def _made(trainer: Any, module: Any, settings: Settings, begun: Begun) -> LinearForecast | str:
    """This rank's forecast, or why it has none."""
    if (reason := why_not(trainer, module)) is not None:
        return reason
    start, resumed, weights = begun
    targets = settings.targets if callable(settings.targets) else None
    network = Network(module, settings.monitor["outputs"])
    args: Any = (network, trainer.optimizers[0], settings.monitor["loss"])
    try:
        if weights is not None and content_hash(network.parameters) != weights:
            return OTHER_WEIGHTS
        with true_precision(trainer):
            return LinearForecast(*args, targets=targets, start=start, resumed=resumed)
    except ValueError as error:
        return str(error)
    except Exception as error:  # the user's loss, outputs and optimizer are called
        return f"the forecast could not be made ({type(error).__name__}: {error})"

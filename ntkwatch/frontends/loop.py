"""watch: any training loop, through the hooks that torch's optimizers offer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.measurement.arguments import check_arguments, check_choice
from ntkwatch.probes import as_probe_set
from ntkwatch.record import Measurement
from ntkwatch.watching.results import RunResults
from ntkwatch.watching.runner import MeasurementRunner
from ntkwatch.watching.session import Session
from ntkwatch.watching.settings import Settings
from ntkwatch.watching.setup import make_session

RUNS = Path("runs") / "ntkwatch"
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def watch(
    model: nn.Module,
    probes: Any,
    optimizer: Optimizers,
    *,
    targets: Callable[[Any], Any] | Tensor | None = None,
    every: int | Sequence[int] | Callable[[int], bool] | str = "log",
    budget: float | None = 0.02,
    record: str | Path | None = None,
    loggers: Sequence[Any] | None = None,
    outputs: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[Tensor, Tensor], Any] | None = None,
    reduction: str = "trace",
    engine: str = "auto",
    diagnostics: Sequence[str] | str = "default",
    save_kernels: bool = True,
    on_error: str = "warn",
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Watch:
    """Watch the empirical NTK of `model` in a training loop of any form.

    Step 0 is measured at once, later steps as `optimizer.step()` completes them, and the last step by `close`.

    Args:
        model: the module that the loop trains; every measurement leaves it exactly as it was.
        probes: the examples to watch: a batch in the form of the loader's, a tensor of inputs, or a ProbeSet.
        optimizer: completes a training step by its `step`; of a list, the last one does.
        targets: None (from the batch), a tensor for the probes, or a callable of the batch.
        every: "log" (0 and round(2^(k/4))), a number of steps, a list of steps, or a function of the step.
        budget: share of wall time that measuring may take, beyond 5 s in all that are free; None: no limit.
        record: the record's folder; None: a new one, `runs/ntkwatch/<id>`.
        loggers: objects that offer `log_metrics(metrics, step)`; None: the record alone.
        outputs, loss, reduction, engine, diagnostics, save_kernels, on_error, hparams, seed: as in `NTKWatch`.

    Returns:
        A `Watch`: close it, or use it as a context manager.

    Raises:
        ValueError: an argument of an unknown value, probes that do not fit the model, a distributed run.

    >>> import tempfile
    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with watch(model, torch.eye(3), optimizer, record=folder + "/record") as watched:
    ...         for _ in range(3):
    ...             model(torch.ones(1, 3)).sum().backward()
    ...             optimizer.step()
    ...     watched.last.step
    3
    """
    check_choice("on_error", on_error, ("warn", "raise"))
    check_arguments(reduction, engine, seed, model=model, record=record)
    settings = Settings.checked(
        probes, every, budget, seed, outputs=outputs, targets=targets, loss=loss, reduction=reduction, engine=engine,
        diagnostics=diagnostics, resample=False, save_kernels=save_kernels, loggers=loggers, hparams=hparams,
    )  # fmt: skip
    return Watch(model, _listed(optimizer), settings, on_error, _folder(record), is_named=record is not None)


class Watch:
    """A watched training loop; made by `watch`."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: Settings,
        on_error: str,
        folder: Path,
        is_named: bool,
    ) -> None:
        self._optimizers = list(optimizers)
        self._runner = runner = MeasurementRunner(settings, on_error, RunResults())
        if settings.wanted.data is None:
            raise ValueError(
                "ntkwatch.watch takes the examples themselves as probes=: pass a batch, a tensor or a ProbeSet"
            )
        if runner.ranks.size > 1:
            raise ValueError("ntkwatch.watch watches one process; in a distributed run pass NTKWatch to a Trainer")
        self._hook: Any = None
        runner.shared_schedule.settle(runner.ranks, runner.failures)
        runner.start()
        runner.run("the look at model and probes", partial(self._open, model, settings, folder, is_named), start=True)
        if runner.is_on:
            runner.run("the first measurement", self._measure_first, start=True)
        if runner.is_on:
            self._session.warn_of_missing_forecast()
            self._hook = self._optimizers[-1].register_step_post_hook(self._after_step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(completed=kind is None)

    @property
    def record(self) -> Path | None:
        """The record's folder; None where nothing could be written."""
        return self._runner.results.record

    @property
    def last(self) -> Measurement | None:
        """The newest measurement; None where there is none."""
        return self._runner.results.last

    def measure(self) -> Measurement | None:
        """Measure now, whatever `every` and `budget` say; None where that failed. A step is measured once."""
        runner = self._runner
        if runner.session is not None and runner.is_on and runner.measured_at != runner.step:
            runner.measure(self._measure, last=True)
        return self.last if runner.measured_at == runner.step else None

    def summary(self) -> str:
        """The run in words, with its numbers, as `ntkwatch show` tells it; or why there is nothing to tell."""
        return self._runner.summary()

    def close(self) -> None:
        """Measure the last step, finish the record and let go of the model. A second call does nothing."""
        self._close(completed=True)

    @property
    def _session(self) -> Session:
        assert self._runner.session is not None
        return self._runner.session

    def _open(self, model: nn.Module, settings: Settings, folder: Path, is_named: bool) -> None:
        session = self._runner.session = make_session(
            settings,
            model,
            as_probe_set(settings.wanted.data, settings.targets),
            self._runner.schedule.clock,
            folder=folder,
            is_log=is_named,
            loggers=settings.loggers or (),
            optimizers=self._optimizers,
            hparams=settings.hparams,
        )
        session.begin()

    def _measure_first(self) -> Measurement:
        self._runner.schedule.due(0)
        self._runner.shared_schedule.due(0)
        return self._measure()

    def _measure(self, last: bool = False) -> Measurement:
        return self._session.probe(
            self._runner.step,
            last=last,
            optimizer=self._optimizers[0] if len(self._optimizers) == 1 else None,
        )

    def _after_step(self, *_: Any) -> None:
        """torch calls this when `optimizer.step` has updated the parameters."""
        runner = self._runner
        self._session.renew()
        runner.step += 1
        if runner.is_due():
            runner.measure(self._measure)

    def _close(self, completed: bool) -> None:
        runner = self._runner
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if completed and runner.session is not None and runner.is_on and runner.measured_at not in (None, runner.step):
            runner.measure(partial(self._measure, last=True), last=True)
        runner.finish(completed)
        runner.session = None
        self._optimizers = []


def _listed(optimizer: Any) -> list[torch.optim.Optimizer]:
    """One optimizer or several, as a list.

    Raises:
        ValueError: something else.
    """
    found = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    if not isinstance(found, Sequence) or not found or not all(isinstance(o, torch.optim.Optimizer) for o in found):
        raise ValueError(f"optimizer={optimizer!r} is not understood: pass a torch optimizer, or a list of them")
    return list(found)


def _folder(record: str | Path | None) -> Path:
    return Path(record) if record is not None else RUNS / time.strftime("run-%Y%m%d-%H%M%S")

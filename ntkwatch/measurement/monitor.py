"""Monitor: a model, its probes and a baseline → Measurements. No Lightning: a plain loop or Fabric uses it too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch import diagnostics as table
from ntkwatch.diagnostics import View
from ntkwatch.diagnostics.evaluations import NO_THETA_0, Instruments
from ntkwatch.engines.auto import Choice, choose
from ntkwatch.engines.base import Kernel, Reduction
from ntkwatch.guard import leave_no_trace
from ntkwatch.linearized.forecast import NO_FORECAST, LinearForecast, at_probe
from ntkwatch.measurement.arguments import LAYERS, check_arguments, count_outputs, to_measure
from ntkwatch.measurement.baseline import Baseline, first_statistics, parameter_distances
from ntkwatch.measurement.comparison import loss_at, path_length, previous_kernel, targets_of
from ntkwatch.measurement.infinite_limit import WideLimit, wide_limit
from ntkwatch.measurement.manifest import context, describe, not_finite, optimizers
from ntkwatch.measurement.overhead import OverheadClock
from ntkwatch.measurement.reductions import Derived, on_cpu
from ntkwatch.model import Network, take, to_device
from ntkwatch.model.loss import loss_of
from ntkwatch.model.optimizer import read_rule
from ntkwatch.probes import ProbeSet, encode_targets, taken
from ntkwatch.record import Measurement, RecordWriter

__all__ = ["Monitor"]

FIRST_PROBES = "resample=True: the infinite-width limit is that on the first probes"
STATISTICS = {"statistics_shift", "statistics_angle"}  # these alone need a second kernel, at the statistics of now


class Monitor:
    """Measures the empirical NTK of `model` on fixed probes and compares it with the first measurement.

    Args:
        model: any nn.Module; it is left exactly as it was by every call.
        probes: a ProbeSet, or a batch of n rows in the form that the model's loader gives.
        targets: None (of a tuple, the item after those that forward requires; else the labels key), a tensor, or a
            callable of the batch. `taken` says in one line what were the inputs and what the targets.
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.
        loss: callable (outputs, targets) -> mean loss, for the diagnostics that need one.
        reduction: "trace", "blocks", "full" or "sum"; see `empirical_ntk`.
        engine: "auto", "layerwise" or "functional".
        diagnostics: "default", "full" or a list of names and presets; those of sign descent by name alone.
        record: a folder to write the record to, or None.
        hparams: hyperparameters kept in the record's manifest, such as {"width": 256}.
        seed: for everything random here; the run's own generators are never touched.

    Raises:
        ValueError: an unknown reduction, engine or diagnostic; outputs that are not finite; a kernel too large.
        UnsupportedModel: outputs that are not [n, C]; no trained parameters.
        MemoryError: one forward pass of the probes is too much.

    >>> monitor = Monitor(torch.nn.Linear(3, 2), torch.eye(3))
    >>> monitor.measure(0).metrics["kernel_angle"]
    0.0
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Any,
        targets: Tensor | Callable[[Any], Tensor] | None = None,
        *,
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        reduction: str = "trace",
        engine: str = "auto",
        diagnostics: str | Sequence[str] = "default",
        record: str | Path | None = None,
        hparams: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        given = {"model": model, "outputs": outputs, "loss": loss, "targets": targets, "record": record}
        check_arguments(reduction, engine, seed, hparams=hparams, **given)
        self.diagnostics, self.follows = table.select(diagnostics), table.names_forecast(diagnostics)
        self.model, self.engine, self.seed = model, engine, seed
        self.reduction: Reduction = reduction  # type: ignore[assignment]  # checked above
        self.hparams = dict(hparams or {})
        self.network = Network(model, outputs)
        given_probes = ProbeSet.of(probes, targets)
        self.n_outputs = count_outputs(self.network, given_probes.batch, reduction)
        self.probes = self.read(given_probes)
        self.taken = taken(self.network, self.probes, self.n_outputs)
        self.loss = loss_of(self.network.module, loss)
        self._measured, self._left_out = to_measure(
            self.reduction, table.reduction(self.diagnostics), len(self.probes), self.n_outputs
        )
        self.targets, self.targets_reason = encode_targets(self.probes.targets, self.n_outputs)
        self.choice: Choice | None = None
        self.baseline: Baseline | None = None
        self.calibration: str | None = None
        self.statistics: dict[str, Tensor] = {}
        self.limit = WideLimit("the run that this continues did not keep it")
        self.previous: tuple[int, Tensor] | None = None
        self._at_start: dict[str, Tensor] = {}  # what diagnostics computed at θ_0
        self.path_length: float | None = 0.0  # Σ angle over successive probes; None where an earlier part is not known
        self.forecast: LinearForecast | str = NO_FORECAST  # or why there is none
        self.nngp: Tensor | None = None  # [n, n] of the probes, to be set where the limit's own is not to be taken
        self._folder = Path(record) if record is not None else None
        self._writer: RecordWriter | None = None
        self.clock = OverheadClock()  # a front end puts its own here

    # ── the baseline ──────────────────────────────────────────────────────────────────────────────────────────────
    def read(self, probes: ProbeSet) -> ProbeSet:
        """The probes with the targets that this model's forward leaves of their batch, where none were given."""
        with leave_no_trace(self.model):
            return probes.for_network(self.network)

    def start(self, batches: Sequence[Any] = ()) -> None:
        """Choose the engine and settle the baseline's BatchNorm statistics; `measure` does it when nobody has.

        batches: training batches for BatchNorm layers that have seen none yet; the probes are always among them.
        """
        with self._probe():
            batch = self._batch(self.probes)
            seen = [batch, *(to_device(other, self.network.device) for other in batches)]
            self.statistics, self.calibration = first_statistics(self.network, seen)
            self.choice = choose(self.network, batch, self.engine)
            if table.needs_limit(self.diagnostics):
                self.limit = wide_limit(self.network, batch, calibrated=self.calibration is not None)

    def foreseen(self) -> float:
        """Seconds that a kernel of the probes may take, from one of two of them: cost grows with their number."""
        assert self.choice is not None
        with self._probe():
            few = take(self._batch(self.probes), slice(0, 2))
            began = time.perf_counter()
            self.choice.engine.kernel(self.network, few, reduction=self._measured, layers=LAYERS)
        return (time.perf_counter() - began) * len(self.probes) / 2

    def restore(
        self,
        baseline: Baseline,
        previous: tuple[int, Tensor] | None,
        path_length: float | None = None,
        limit: WideLimit | None = None,
    ) -> None:
        """Continue an earlier run: its baseline, last kernel, the path's length up to there, infinite-width limit."""
        with self._probe():
            self.choice = choose(self.network, self._batch(self.probes), self.engine)
        self.baseline, self.previous = baseline, previous
        self.statistics = dict(baseline.statistics)
        self.path_length, self.limit = path_length, limit or self.limit

    # ── a probe ───────────────────────────────────────────────────────────────────────────────────────────────────
    def measure(
        self,
        step: int,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        probes: ProbeSet | None = None,
        global_step: int | None = None,
        epoch: int | None = None,
    ) -> Measurement:
        """Measure the kernel as the model stands now. The first call sets K_0 and θ_0.

        probes: fresh inputs for this call alone; both θ_t and θ_0 are then evaluated on them.
        global_step, epoch: kept beside the step in the measurement.
        """
        with self.clock.measuring():
            measurement = self._measure(step, optimizer, probes, global_step=global_step, epoch=epoch)
            measurement.metrics["overhead"] = self.clock.share
        if self._folder is not None:
            if self._writer is None:
                self._writer = RecordWriter.create(self._folder, self.manifest() | optimizers([optimizer]))
            self._writer.append(measurement)
        return measurement

    def _measure(
        self, step: int, optimizer: torch.optim.Optimizer | None, probes: ProbeSet | None, **at: int | None
    ) -> Measurement:
        began = time.perf_counter()
        self.network.check_parameters()
        if self.choice is None:
            self.start()
        first = self.baseline is None
        if first and step > 0:
            self.limit = WideLimit(f"the run was first seen at step {step}, and the limit is that of step 0")
        probes = None if probes is None else self.read(probes)
        with self._probe():
            kernel, view = self._look(step, probes, optimizer)
            finite = bool(torch.isfinite(view.kernel).all())
            if self.baseline is None:
                if not finite:
                    raise ValueError("the kernel at the baseline is not finite: look at the model's gradients")
                self.baseline = Baseline.keep(step, self.network, view.kernel, dict(view.layers), self.statistics)
            values, reasons = table.evaluate(self.diagnostics, view) if finite else not_finite(self, kernel)
            by_layer = table.layer_metrics(view, self.diagnostics) if finite else {}
        if probes is None and finite:
            self.previous = (step, view.kernel)
            self.path_length = None if isinstance(view.path_length, str) else view.path_length
        return Measurement(
            step=step,
            metrics=values,
            reasons=reasons,
            kernel=view.kernel,
            layers=dict(view.layers),
            eigenvalues=view.eigenvalues if finite else torch.full((len(view.trace),), torch.nan),
            seconds=time.perf_counter() - began,
            layer_metrics=by_layer,
            **at,
            outputs=kernel.outputs.detach().cpu(),
            context=context(self, kernel, view.floor if finite else None, probes),
            limit=view.limit if first and not isinstance(view.limit, str) else None,
        )

    def _look(self, step: int, probes: ProbeSet | None, optimizer: torch.optim.Optimizer | None) -> tuple[Kernel, View]:
        """One kernel now, and what it is compared with."""
        batch, statistics = self._batch(probes or self.probes), self.network.placed(self.statistics)
        base = self.baseline
        rich = self._kernel(batch, statistics or None, self._measured)
        derived = Derived(rich, self.reduction, self._left_out)
        kernel = derived.own
        value = on_cpu(kernel.value)
        layers = {name: on_cpu(layer) for name, layer in kernel.layers.items()}
        start, start_layers = value, layers
        if base is not None and probes is None:
            start, start_layers = base.kernel, base.layers
        elif base is not None:
            start, start_layers = self._baseline_on(batch)
        live = self._kernel(batch, None) if statistics and STATISTICS & {*self.diagnostics} else None
        previous = previous_kernel(self, probes)
        view = View(
            step=step,
            kernel=value,
            kernel_0=start,
            trace=derived.trace,
            layers=layers,
            layers_0=start_layers,
            outputs=kernel.outputs.detach().cpu(),
            relative_floor=kernel.noise_floor,
            previous=previous,
            targets=targets_of(self, probes),
            motion=base.motion(self.network, batch, kernel.outputs) if base else "no motion yet: this is the baseline",
            parameter_distances=parameter_distances(self.network, base),
            statistics_kernel=on_cpu(live.value) if live is not None else None,
            statistics_outputs=live.outputs.detach().cpu() if live is not None else None,
            seed=self.seed,
            theta=derived.full,
            blocks=derived.blocks,
            path_length=path_length(self, value, previous),
            loss=loss_at(self, kernel.outputs, probes),
            optimizer=read_rule(optimizer, self.network.parameters),
            **at_probe(self.forecast, self.network, batch),
            nngp=self.limit.prior(self.nngp, len(self.probes)) if probes is None else FIRST_PROBES,
            instruments=self._instruments(batch, statistics, self._at_start if probes is None else {}),
            start_step=base.step if base is not None else step,
            limit=self.limit.kernel if probes is None else FIRST_PROBES,
        )
        return kernel, view

    def _instruments(self, batch: Any, statistics: dict[str, Tensor], kept: dict[str, Tensor]) -> Instruments:
        assert self.choice is not None
        base = self.baseline

        def start() -> Mapping[str, Tensor] | None:
            if base is not None:
                return base.state(self.network)
            return {name: p.detach() for name, p in {**self.network.parameters, **statistics}.items()}

        return Instruments(self.network, batch, self.choice.engine, statistics, start, kept, base is None)

    def _kernel(self, batch: Any, state: Mapping[str, Tensor] | None, reduction: Reduction | None = None) -> Kernel:
        assert self.choice is not None
        return self.choice.engine.kernel(
            self.network, batch, reduction=reduction or self.reduction, layers=LAYERS, state=state
        )

    def _baseline_on(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.baseline is not None
        state = self.baseline.state(self.network)
        if state is None:
            raise ValueError(f"fresh probes need θ_0, but {NO_THETA_0}: use resample=False")
        kernel = self._kernel(batch, state)
        return on_cpu(kernel.value), {name: on_cpu(layer) for name, layer in kernel.layers.items()}

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """The guard, with the parameters that were trained at step 0 differentiable even if frozen since."""
        with leave_no_trace(self.model):
            for parameter in self.network.parameters.values():
                parameter.requires_grad_(True)
            yield

    def _batch(self, probes: ProbeSet) -> Any:
        return self.network.batch(to_device(probes.batch, self.network.device))

    def manifest(self) -> dict[str, Any]:
        """Everything that a reader needs in order to know what the numbers mean; complete after `start`."""
        return describe(self)

"""Monitor: a model, its probes and a baseline → Measurements. No Lightning: a plain loop or Fabric uses it too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ntkwatch.baseline import NO_THETA_0, Baseline, parameter_distances
from ntkwatch.diagnostics import View, evaluate, layer_metrics, select
from ntkwatch.engines import UnsupportedModel
from ntkwatch.engines.auto import Choice, choose
from ntkwatch.engines.base import Kernel, Reduction, reduce
from ntkwatch.guard import leave_no_trace
from ntkwatch.manifest import describe
from ntkwatch.model import (
    Network,
    batch_size,
    calibrated_statistics,
    inputs_of,
    running_statistics,
    to_device,
    untracked_statistics,
)
from ntkwatch.probes import ProbeSet, encode_targets
from ntkwatch.record import Measurement, RecordWriter

REDUCTIONS = ("trace", "blocks", "full", "sum")
ENGINES = ("auto", "functional", "layerwise")
FULL_LIMIT = 1e9  # bytes of one [nC, nC] float64 kernel


class Monitor:
    """Measures the empirical NTK of `model` on fixed probes and compares it with the first measurement.

    Args:
        model: any nn.Module; it is left exactly as it was by every call.
        probes: a ProbeSet, or a batch of n rows in the form that the model's loader gives.
        targets: None (the batch's second element or labels key), a tensor, or a callable of the batch.
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.
        loss: callable (outputs, targets) -> mean loss, for the diagnostics that need one.
        reduction: "trace", "blocks", "full" or "sum"; see `empirical_ntk`.
        engine: "auto", "layerwise" or "functional".
        diagnostics: "default", "full" or a list of names.
        record: a folder to write the record to, or None.
        hparams: hyperparameters kept in the record's manifest, such as {"width": 256}.
        seed: for everything random here; the run's own generators are never touched.

    Raises:
        ValueError: an unknown reduction, engine or diagnostic; outputs that are not finite; a kernel too large.
        UnsupportedModel: outputs that are not [n, C]; no trained parameters.

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
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("engine", engine, ENGINES)
        self.diagnostics = select(diagnostics)
        self.model, self.loss, self.engine, self.seed = model, loss, engine, seed
        self.reduction: Reduction = reduction  # type: ignore[assignment]  # checked above
        self.hparams = dict(hparams or {})
        self.network = Network(model, outputs)
        self.probes = _probe_set(probes, targets)
        self.n_outputs = self._check_outputs()
        self.targets, self.targets_reason = encode_targets(self.probes.targets, self.n_outputs)
        self.choice: Choice | None = None
        self.baseline: Baseline | None = None
        self.calibration: str | None = None
        self._statistics: dict[str, Tensor] = {}
        self.previous: tuple[int, Tensor] | None = None
        self._folder = Path(record) if record is not None else None
        self._writer: RecordWriter | None = None
        self._clock: tuple[float, float] | None = None

    # ── the baseline ──────────────────────────────────────────────────────────────────────────────────────────────
    def _check_outputs(self) -> int:
        with leave_no_trace(self.model), torch.no_grad():
            outputs = self._outputs_on_probes()
        bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
        if bad:
            raise ValueError(
                f"the model's outputs are not finite on {bad} of {len(outputs)} probes: "
                "look for NaN in the probe inputs or the weights"
            )
        n, n_outputs = outputs.shape
        if n != len(self.probes):
            raise UnsupportedModel(
                f"the model gave {n} rows of outputs for {len(self.probes)} probes: pass outputs=, "
                "a callable (model, batch) -> [n, C]"
            )
        if self.reduction == "full" and (n * n_outputs) ** 2 * 8 > FULL_LIMIT:
            raise ValueError(
                f"the full kernel of {n} probes x {n_outputs} outputs takes {(n * n_outputs) ** 2 * 8 / 1e9:.1f} GB "
                "(limit 1 GB): use fewer probes or reduction='trace'"
            )
        return n_outputs

    def _outputs_on_probes(self) -> Tensor:
        try:
            return self.network.outputs(self._batch(self.probes))
        except UnsupportedModel:
            raise
        except Exception as error:
            raise ValueError(
                f"the model failed on the probes ({type(error).__name__}: {error}): "
                "give probes= in the form of the loader's batches, or outputs=, a callable (model, batch) -> [n, C]"
            ) from error

    def start(self, batches: Sequence[Any] = ()) -> None:
        """Choose the engine and settle the baseline's BatchNorm statistics; `measure` does it when nobody has.

        batches: training batches for BatchNorm layers that have seen none yet; the probes are always among them.
        """
        with self._probe():
            batch = self._batch(self.probes)
            if untracked_statistics(self.model):
                seen = [batch, *(to_device(other, self.network.device) for other in batches)]
                self._statistics = calibrated_statistics(self.network, seen)
                rows = sum(batch_size(inputs_of(other)) for other in seen)
                self.calibration = (
                    f"BatchNorm has tracked no batch yet: the baseline uses statistics calibrated on {rows} rows "
                    "(the probes and the first training batch)"
                )
            else:
                self._statistics = {k: v.detach().clone() for k, v in running_statistics(self.model).items()}
            self.choice = choose(self.network, batch, self.engine)

    def restore(self, baseline: Baseline, previous: tuple[int, Tensor] | None) -> None:
        """Continue an earlier run: its baseline and the last kernel it measured."""
        with self._probe():
            self.choice = choose(self.network, self._batch(self.probes), self.engine)
        self.baseline, self._statistics, self.previous = baseline, dict(baseline.statistics), previous

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
        began = time.perf_counter()
        if self.choice is None:
            self.start()
        with self._probe():
            kernel, view = self._look(step, probes)
            finite = bool(torch.isfinite(view.kernel).all())
            if self.baseline is None:
                if not finite:
                    raise ValueError("the kernel at the baseline is not finite: look at the model's gradients")
                self.baseline = Baseline.keep(step, self.network, view.kernel, dict(view.layers), self._statistics)
            values, reasons = evaluate(self.diagnostics, view) if finite else self._not_finite(kernel)
            by_layer = layer_metrics(view) if finite else {}
        if probes is None and finite:
            self.previous = (step, view.kernel)
        measurement = Measurement(
            step=step,
            metrics=values,
            reasons=reasons,
            kernel=view.kernel,
            layers=dict(view.layers),
            eigenvalues=view.eigenvalues if finite else torch.full((len(view.trace),), torch.nan),
            seconds=time.perf_counter() - began,
            layer_metrics=by_layer,
            global_step=global_step,
            epoch=epoch,
            outputs=kernel.outputs.detach().cpu(),
            context=self._context(kernel, view.floor if finite else None, probes),
        )
        return self._with_overhead(measurement, began)

    def _look(self, step: int, probes: ProbeSet | None) -> tuple[Kernel, View]:
        """One kernel now, and what it is compared with."""
        batch = self._batch(probes or self.probes)
        kernel = self._kernel(batch, self._statistics or None)
        value = _on_cpu(kernel.value)
        layers = {name: _on_cpu(layer) for name, layer in kernel.layers.items()}
        base = self.baseline
        start, start_layers = value, layers
        if base is not None and probes is None:
            start, start_layers = base.kernel, base.layers
        elif base is not None:
            start, start_layers = self._baseline_on(batch)
        live = self._kernel(batch, None) if self._statistics else None
        targets: Tensor | None = self.targets
        reason = self.targets_reason
        if probes is not None:
            targets, reason = encode_targets(probes.targets, self.n_outputs)
        view = View(
            step=step,
            kernel=value,
            kernel_0=start,
            trace=_trace(kernel),
            layers=layers,
            layers_0=start_layers,
            outputs=kernel.outputs.detach().cpu(),
            relative_floor=kernel.noise_floor,
            previous=self._compared(probes),
            targets=targets if targets is not None else (reason or "there are no targets"),
            motion=base.motion(self.network, batch, kernel.outputs) if base else "no motion yet: this is the baseline",
            parameter_distances=parameter_distances(self.network, base),
            statistics_kernel=_on_cpu(live.value) if live is not None else None,
            statistics_outputs=live.outputs.detach().cpu() if live is not None else None,
            seed=self.seed,
        )
        return kernel, view

    def _compared(self, probes: ProbeSet | None) -> tuple[int, Tensor] | str:
        if probes is not None:
            return "resample=True: kernels on different inputs are not compared"
        return self.previous or "first probe: there is no earlier kernel to compare with"

    def _kernel(self, batch: Any, state: Mapping[str, Tensor] | None) -> Kernel:
        assert self.choice is not None
        return self.choice.engine.kernel(self.network, batch, reduction=self.reduction, layers="trace", state=state)

    def _baseline_on(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.baseline is not None
        state = self.baseline.state(self.network.device)
        if state is None:
            raise ValueError(f"fresh probes need θ_0, but {NO_THETA_0}: use resample=False")
        kernel = self._kernel(batch, state)
        return _on_cpu(kernel.value), {name: _on_cpu(layer) for name, layer in kernel.layers.items()}

    def _not_finite(self, kernel: Kernel) -> tuple[dict[str, float | None], dict[str, str]]:
        bad = int((~torch.isfinite(kernel.outputs)).any(dim=1).sum())
        what = (
            f"the outputs are not finite on {bad} of {len(kernel.outputs)} probes" if bad else "its gradients overflow"
        )
        names = [name for name in self.diagnostics if not name.startswith("statistics_") or self._statistics]
        return dict.fromkeys(names), dict.fromkeys(names, f"the kernel is not finite: {what}")

    # ── small things ──────────────────────────────────────────────────────────────────────────────────────────────
    @contextmanager
    def _probe(self) -> Iterator[None]:
        """The guard, with the parameters that were trained at step 0 differentiable even if frozen since."""
        with leave_no_trace(self.model):
            for parameter in self.network.parameters.values():
                parameter.requires_grad_(True)
            yield

    def _batch(self, probes: ProbeSet) -> Any:
        return to_device(probes.batch, self.network.device)

    def _context(
        self, kernel: Kernel, floor: float | None, probes: ProbeSet | None
    ) -> dict[str, str | int | float | bool | None]:
        return {
            "reduction": kernel.reduction,
            "engine": kernel.engine,
            "mode": "eval",
            "precision": kernel.precision,
            "dtype": str(kernel.outputs.dtype).removeprefix("torch."),
            "noise_floor": floor,
            "probe_hash": (probes or self.probes).hash,
            "statistics": "none" if not self._statistics else "calibrated" if self.calibration else "baseline",
        }

    def _with_overhead(self, measurement: Measurement, began: float) -> Measurement:
        """Share of wall time spent in `measure` since its first call, and the record where one is kept."""
        start, spent = self._clock or (began, 0.0)
        now = time.perf_counter()
        self._clock = (start, spent + now - began)
        measurement.metrics["overhead"] = self._clock[1] / max(now - start, 1e-9)
        if self._folder is not None:
            if self._writer is None:
                self._writer = RecordWriter.create(self._folder, self.manifest())
            self._writer.append(measurement)
        return measurement

    def manifest(self) -> dict[str, Any]:
        """Everything that a reader needs in order to know what the numbers mean; complete after `start`."""
        return describe(self)


def check_choice(name: str, got: str, allowed: Sequence[str]) -> None:
    """Raises ValueError naming the argument, what it got and what it takes."""
    if got not in allowed:
        raise ValueError(f"{name}={got!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def _probe_set(probes: Any, targets: Tensor | Callable[[Any], Tensor] | None) -> ProbeSet:
    if isinstance(probes, ProbeSet) and targets is None:
        return probes
    batch = probes.batch if isinstance(probes, ProbeSet) else probes
    given = targets(batch) if callable(targets) else targets
    return ProbeSet.from_batch(batch, targets=given)


def _on_cpu(kernel: Tensor) -> Tensor:
    return kernel.detach().double().cpu()


def _trace(kernel: Kernel) -> Tensor:
    """[n, n]: the trace reduction of the kernel, whatever was measured."""
    if kernel.reduction == "sum":
        return _on_cpu(torch.stack(list(kernel.layers.values())).sum(dim=0))
    return _on_cpu(reduce(kernel.value, cast(Reduction, kernel.reduction), "trace"))

"""One probe of a run: its numbers, why some are undefined, and the kernels behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

ROOT_MODULE = "model"  # how the root module, whose own name is "", is called in a tag


@dataclass(frozen=True, eq=False)
class Limit:
    """The kernel [m, m] that a model's first one tends to with width, trace-reduced, on these of the probes, [m].

    nngp: the covariance of an output at initialisation, on the same probes; None in records of before it was kept.
    """

    kernel: Tensor
    rows: Tensor
    nngp: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one probe found, for n probes and C outputs; tensors are on the CPU, kernels float64.

    ``metrics`` are flat, by names without ``ntk/``; None is an undefined value, and ``reasons`` says why in a sentence.
    ``kernel`` is [n, n] under the reductions trace and sum, [C, n, n] under blocks, [n, C, n, C] under full.
    ``layers`` holds an [n, n] trace-reduced kernel by parameter name; they sum to the trace kernel.
    ``layer_metrics`` holds metrics by module name ("" is the root).
    ``eigenvalues`` are descending: [n], or [n·C] under full.
    ``outputs`` are [n, C]; ``seconds`` is the wall time of the whole probe.
    ``context`` says what the numbers are numbers of: reduction, engine, mode, probe_hash, precision, noise_floor …
    ``limit`` is the infinite-width kernel, at a run's first probe alone.
    """

    step: int
    metrics: dict[str, float | None]
    reasons: dict[str, str]
    kernel: Tensor
    layers: dict[str, Tensor]
    eigenvalues: Tensor
    seconds: float
    layer_metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    global_step: int | None = None
    epoch: int | None = None
    outputs: Tensor | None = None
    context: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    limit: Limit | None = None

    def as_flat(self) -> dict[str, float]:
        """The defined values by the names that loggers see: ``ntk/<name>`` and ``ntk_layers/<module>/<name>``."""
        flat = {f"ntk/{name}": value for name, value in self.metrics.items()}
        for module, values in self.layer_metrics.items():
            flat |= {f"ntk_layers/{module or ROOT_MODULE}/{name}": value for name, value in values.items()}
        return {tag: float(value) for tag, value in flat.items() if value is not None and math.isfinite(value)}

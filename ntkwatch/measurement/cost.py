"""What a probe costs before it is done: the plan of its kernel, and a row for everything that its diagnostics add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ntkwatch import engines
from ntkwatch.diagnostics import Price, names_forecast, prices, select
from ntkwatch.diagnostics import reduction as richest_of
from ntkwatch.diagnostics.laziness import STATISTICS
from ntkwatch.engines import Plan
from ntkwatch.engines.base import Precision, Reduction, Row
from ntkwatch.engines.machines import MACHINES
from ntkwatch.engines.planning import PASSES
from ntkwatch.guard import leave_no_trace
from ntkwatch.measurement.arguments import LAYERS, to_measure
from ntkwatch.model import Network, OutputsFn
from ntkwatch.model.batch_statistics import running_statistics
from ntkwatch.model.errors import explained

ALGEBRA = 4.5e10  # operations per second, in the units of Price: measured on one core, on 640 × 640
FORECAST = (
    "the linear forecast takes a forward-mode product, a forward and a backward pass of every training batch besides, "
    "two to three training steps a step"
)


def plan(
    model: nn.Module,
    x: Any,
    *,
    reduction: Reduction = "trace",
    layers: Reduction | None = None,
    engine: str = "auto",
    outputs: OutputsFn | None = None,
    params: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    precision: Precision = "double",
    diagnostics: str | Sequence[str] | None = None,
) -> Plan:
    """What `empirical_ntk` would do: engine and reason, rule and cost per parameter, peak memory, probes per block.

    Seconds are those of an idle machine, on the threads that the process has. The passes are timed on a few probes, so
    that they differ a little from call to call; all else is counted, and nothing is decided by a time.

    layers: the reduction of a kernel kept for each parameter, as `layer_ntks` keeps them in its own; None for none.
    diagnostics: "default", "full" or a list of names: then of a probe of a Monitor with these, on the probes `x`. The
        kernel is the richest that they need, `layers` is "trace" as there, and rows named "+ …" say what they add;
        what only Adam costs is counted. None: of the kernel alone.

    Raises:
        UnsupportedModel, ValueError: as `empirical_ntk` would; ValueError for unknown diagnostics.

    >>> for row in plan(nn.Linear(3, 1), torch.eye(3), diagnostics=["feature_angle"]).rows():
    ...     print(row.name)
    forward and backward
    weight
    bias
    + eigenvalues of the kernel
    + a forward pass at θ_0 and one at θ_t
    """
    settings: dict[str, Any] = {"engine": engine, "outputs": outputs, "params": params}
    settings |= {"chunk_size": chunk_size, "precision": precision}
    if diagnostics is None:
        return engines.plan(model, x, reduction=reduction, layers=layers, **settings)
    names, network = select(diagnostics), Network(model, outputs, params)
    with leave_no_trace(network.module), torch.no_grad(), explained(network, x):
        x = network.batch(x)
        n, c = x.n, network.outputs(x).shape[1]
    measured, left_out = to_measure(reduction, richest_of(names), n, c)
    kernel = engines.plan(model, x, reduction=measured, layers=layers or LAYERS, **settings)
    probe = _Probe(kernel, network, n, c, reduction)
    tracked = bool(running_statistics(network.module))
    rows = [probe.row(price, asked) for price, asked in prices(names).items() if tracked or price is not STATISTICS]
    notes = [left_out] if left_out else []
    notes += [FORECAST] if names_forecast(diagnostics) else []
    return replace(kernel, table=(*kernel.table, probe.spectrum(), *rows), notes=tuple(notes))


@dataclass(frozen=True)
class _Probe:
    """One probe: its kernel's plan, n probes, C outputs, and the reduction that the run keeps."""

    kernel: Plan
    network: Network
    n: int
    c: int
    reduction: str

    def row(self, price: Price, names: Sequence[str]) -> Row:
        """One cost, and who asks for it."""
        passes = self._passes(price.passes + price.per_output * self.c)
        kernels = [price.kernels * sum(getattr(row, what) for row in self.kernel.table) for what in _COLUMNS]
        algebra = self._algebra(price)
        flops, moved, seconds = (sum(parts) for parts in zip(passes, kernels, algebra, strict=True))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return Row(f"+ {price.text}", f"{names[0]}{more}", flops, moved, seconds)

    def spectrum(self) -> Row:
        """The eigenvalues that every probe records."""
        side = self.n * self.c if self.reduction == "full" else self.n
        return self.row(Price("eigenvalues of the kernel", squares=6 * (side / self.n) ** 3), ["every probe"])

    def _passes(self, count: float) -> tuple[float, ...]:
        forward = next(row for row in self.kernel.table if row.name == PASSES)
        return tuple(count * getattr(forward, what) / (1 + self.c) for what in _COLUMNS)

    def _algebra(self, price: Price) -> tuple[float, ...]:
        flops = price.squares * self.n**3 + price.fulls * (self.n * self.c) ** 3 + price.weights * self._weights()
        moved = price.sweeps * (self.n + 1) * self._entries() * 8
        return flops, moved, flops / ALGEBRA + moved / MACHINES["cpu"].bandwidth

    def _entries(self) -> float:
        return self.n**2 * {"full": self.c**2, "blocks": self.c}.get(self.reduction, 1)

    def _weights(self) -> float:
        """Multiply-adds of a product of every weight matrix with its transpose."""
        matrices = [p.flatten(1).shape for p in self.network.parameters.values() if p.ndim >= 2]
        return float(sum(rows * columns * min(rows, columns) for rows, columns in matrices))


_COLUMNS = ("flops", "bytes", "seconds")

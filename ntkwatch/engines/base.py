"""The engines' contract: Engine, Kernel (the result), Plan (rule, cost and memory per parameter), reductions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ntkwatch.model import Network, UnsupportedModel

__all__ = ["Engine", "Kernel", "Plan", "Precision", "Reduction", "Row", "UnsupportedModel", "reduce"]

Reduction = Literal["trace", "blocks", "full", "sum"]
Precision = Literal["double", "single"]

# Reductions that hold enough to derive the others from.
_RICHER: dict[str, tuple[str, ...]] = {
    "full": ("full", "blocks", "trace", "sum"),
    "blocks": ("blocks", "trace"),
    "trace": ("trace",),
    "sum": ("sum",),
}


@dataclass(frozen=True)
class Kernel:
    """An empirical NTK between n1 and n2 examples with C outputs.

    Attributes:
        value: [n1, n2] for "trace" and "sum", [C, n1, n2] for "blocks", [n1, C, n2, C] for "full".
        layers: one kernel per trained parameter, which sum to the whole; empty when not asked for.
        outputs: f(x1), [n1, C].
        reduction: of `value`.
        engine: its name.
        precision: "double" or "single", that of the Gram products.
        noise_floor: relative to λ_max: eigenvalues below noise_floor·λ_max are rounding of the factors.
    """

    value: Tensor
    layers: dict[str, Tensor]
    outputs: Tensor
    reduction: str
    engine: str
    precision: str
    noise_floor: float


class Engine(Protocol):
    """Computes exact kernels. The caller holds the guard (evaluation mode, gradients on)."""

    name: str

    def kernel(
        self,
        network: Network,
        x1: Any,
        x2: Any = None,
        *,
        reduction: Reduction = "trace",
        layers: Reduction | None = "trace",
        state: Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
        precision: Precision = "double",
    ) -> Kernel:
        """The kernel of x1 and x2 (of x1 with itself when None) at the network's parameters, or at `state`'s.

        `layers` is the reduction of the kernels per parameter, None for none. `chunk_size` is probes per block.
        """
        ...


@dataclass(frozen=True)
class Row:
    """What one parameter costs: the rule that treats it, multiply-adds ×2, bytes moved, and the time these predict."""

    name: str
    rule: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a kernel will cost before it is computed; `str()` is a table.

    Attributes:
        engine: the engine's name.
        reason: why this engine, one line.
        peak_bytes: predicted memory over the model's own.
        chunk_size: probes per block.
        notes: what else to know, a sentence each.
    """

    engine: str
    reason: str
    peak_bytes: int
    chunk_size: int
    table: tuple[Row, ...] = field(default=())
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Row]:
        """One row per trained parameter, and one for the forward and backward passes."""
        return list(self.table)

    @property
    def seconds(self) -> float:
        """Predicted wall time of all rows."""
        return sum(row.seconds for row in self.table)

    def __str__(self) -> str:
        name = min(_NAME, max([len(row.name) for row in self.table] + [9]))
        rule = min(_RULE, max([len(row.rule) for row in self.table] + [4]))
        lines = [
            self.reason,
            f"about {_time(self.seconds)}, {self.peak_bytes / 2**20:.0f} MiB over the model, "
            f"{self.chunk_size} probes a block",
            f"{'parameter':<{name}}  {'rule':<{rule}}  {'GFLOP':>7}  {'MB':>7}  {'time':>7}",
        ]
        for row in self.table:
            numbers = f"{_size(row.flops / 1e9):>7}  {_size(row.bytes / 1e6):>7}  {_time(row.seconds):>7}"
            what = f"{_tail(row.name, name):<{name}}  {_head(row.rule, rule):<{rule}}"
            if len(row.name) > name and row.name.startswith("+"):  # a sentence goes over both columns
                what = f"{row.name:<{name + 2 + rule}}"
            lines.append(f"{what}  {numbers}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


_NAME, _RULE = 30, 21  # columns of a table that fits in 80


def _time(seconds: float) -> str:
    """Three digits at most, in the unit that suits."""
    for size, unit in ((60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= (100 if unit == "min" else 1) * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return "< 1 ms" if seconds > 0 else "0"


def _size(value: float) -> str:
    """Two digits, and no exponent."""
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else "< 0.001"


def _tail(name: str, width: int) -> str:
    """The end of a long name, which tells it from its neighbours."""
    return name if len(name) <= width else "…" + name[1 - width :]


def _head(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def reduce(theta: Tensor, source: Reduction, target: Reduction) -> Tensor:
    """The `target` reduction of a kernel given in a richer one.

    Args:
        theta: [n1, C, n2, C] for "full", [C, n1, n2] for "blocks", [n1, n2] for "trace" and "sum".

    Raises:
        ValueError: `source` does not determine `target` (trace and blocks hold no terms between outputs).
    """
    check_reduction(source, "source")
    check_reduction(target, "target")
    if target not in _RICHER[source]:
        raise ValueError(f"a kernel reduced to {source!r} does not determine {target!r}; measure 'full'")
    if source == target:
        return theta
    if source == "blocks":
        return theta.mean(0)
    blocks = theta.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    if target == "blocks":
        return blocks
    return blocks.mean(0) if target == "trace" else theta.sum((1, 3)) / theta.shape[1]


def check_reduction(reduction: str, what: str = "reduction") -> str:
    """The reduction itself, if it is one.

    Raises:
        ValueError: it is none of "trace", "blocks", "full", "sum".
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"{what} must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    return reduction


def entries(reduction: str, outputs: int) -> int:
    """Numbers that a kernel of C outputs holds per pair of examples."""
    return {"full": outputs**2, "blocks": outputs}.get(reduction, 1)


def richest(reduction: Reduction, layers: Reduction | None) -> Reduction:
    """The smallest reduction that determines both."""
    if layers is None or layers in _RICHER[reduction]:
        return reduction
    return layers if reduction in _RICHER[layers] else "full"


def work_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The type that Gram products are taken in: float64 under "double", the factors' own (float32 at least) else.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be 'double' or 'single', got {precision!r}")
    return torch.float64 if precision == "double" or dtype == torch.float64 else torch.float32


def at_hand(precision: Precision, device: torch.device) -> Precision:
    """The precision that a device can give: "single" where it has no float64 (Apple's GPUs), and labelled so."""
    return "single" if device.type == "mps" else precision


def noise_floor(dtype: torch.dtype, precision: Precision) -> float:
    """Below this share of the largest eigenvalue, an eigenvalue is not known to 10 %.

    Factors of type `dtype` carry the rounding of forward and backward passes, and so does the kernel, whatever the type
    of the products; products in float32 add as much again, since no sum of theirs is long. Either error was at most one
    eps of λ_max, in spectral norm, on thirteen architectures; ten of each is the floor. A ReLU that is within rounding
    of zero may fall on the other side of it: that is another function, whose kernel is off by about one part in the
    number of units, and no floor covers it.
    """
    work = work_dtype(dtype, precision)
    return 10 * (torch.finfo(dtype).eps + torch.finfo(work).eps)

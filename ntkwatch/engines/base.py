"""The interface of the engines: Engine, Kernel (the result), reductions, precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ntkwatch.engines.plan import Plan, Row
from ntkwatch.model import Network, UnsupportedModel

__all__ = ["Engine", "Kernel", "Plan", "Precision", "Reduction", "Row", "UnsupportedModel", "reduce"]

Reduction = Literal["trace", "blocks", "full", "sum"]
Precision = Literal["double", "single"]

# For each reduction, those that it determines.
_RICHER: dict[str, tuple[str, ...]] = {
    "full": ("full", "blocks", "trace", "sum"),
    "blocks": ("blocks", "trace"),
    "trace": ("trace",),
    "sum": ("sum",),
}

_COARSEST = 2.0**-8  # limit in half precision, where eps^¾ would cover a large share of all gradients


@dataclass(frozen=True)
class Kernel:
    """An empirical NTK between n1 and n2 examples with C outputs.

    Attributes:
        value: [n1, n2] for "trace" and "sum", [C, n1, n2] for "blocks", [n1, C, n2, C] for "full".
        layers: one kernel per trained parameter, which sum to the whole; empty unless requested.
        outputs: f(x1) [n1, C].
        reduction: of `value`.
        engine: its name.
        precision: of the Gram products, "double" or "single".
        noise_floor: relative to λ_max; eigenvalues below noise_floor·λ_max are rounding error of the factors.
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
        signed: bool = False,
    ) -> Kernel:
        """The kernel of x1 and x2 (None: x1 with itself), at the network's parameters or at those of `state`.

        `layers` is the reduction of the kernels per parameter, None for none. `chunk_size` is the number of probes per
        block. `signed` selects J₁ sign(J₂)ᵀ, the asymmetric kernel of sign descent, in any reduction but "sum", which
        adds outputs before their signs exist.
        """
        ...


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
    """Numbers per pair of examples in a kernel of C outputs."""
    return {"full": outputs**2, "blocks": outputs}.get(reduction, 1)


def richest(reduction: Reduction, layers: Reduction | None) -> Reduction:
    """The smallest reduction that determines both."""
    if layers is None or layers in _RICHER[reduction]:
        return reduction
    return layers if reduction in _RICHER[layers] else "full"


def work_dtype(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """The type of Gram products: float64 under "double", else the type of the factors (float32 at least).

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be 'double' or 'single', got {precision!r}")
    return torch.float64 if precision == "double" or dtype == torch.float64 else torch.float32


def at_hand(precision: Precision, device: torch.device) -> Precision:
    """The precision that a device supports: "single" if it has no float64 (Apple's GPUs), and labelled so."""
    return "single" if device.type == "mps" else precision


def noise_floor(dtype: torch.dtype, precision: Precision) -> float:
    """The share of the largest eigenvalue below which an eigenvalue is not known to 10 %.

    Factors of type `dtype`, the coarsest type in the passes (`Network.rounding`), carry the rounding error of forward
    and backward passes, and so does the kernel, whatever the type of the products. Products in float32 add an error of
    the same size, because their sums are short. On thirteen architectures, each error was at most one eps of λ_max in
    spectral norm; the floor is ten of each. A ReLU within rounding of zero may take the other branch. That is a
    different function, whose kernel differs by about one part in the number of units; no floor covers it.
    """
    work = work_dtype(dtype, precision)
    return 10 * (torch.finfo(dtype).eps + torch.finfo(work).eps)


def share_of_rounding(dtype: torch.dtype) -> float:
    """The share of a parameter's largest gradient entry up to which other entries count as rounding error.

    Behind a normalisation, the remainder of a cancelling sum was up to 200 eps of the largest sum that does not cancel.
    """
    return min(torch.finfo(dtype).eps ** 0.75, _COARSEST)


def signs(gradients: Tensor, share: float | None = None) -> Tensor:
    """The sign of each entry; 0 if its magnitude is at most `share` of the largest along the last dimension."""
    share = share_of_rounding(gradients.dtype) if share is None else share
    limit = share * torch.linalg.vector_norm(gradients, torch.inf, -1, keepdim=True)
    return (gradients > limit).to(gradients.dtype).masked_fill_(gradients < -limit, -1)

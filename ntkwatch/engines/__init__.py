"""Exact empirical NTKs of real models: the public functions, and the package of engines that compute the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ntkwatch.engines.base import (
    Kernel,
    Plan,
    Precision,
    Reduction,
    UnsupportedModel,
    check_reduction,
    richest,
    work_dtype,
)
from ntkwatch.engines.choice_cache import CachedChoice
from ntkwatch.engines.memory import OutOfMemory
from ntkwatch.engines.planning import Wanted, make_plan
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, OutputsFn
from ntkwatch.model.errors import check_batch, explained

__all__ = ["Kernel", "Plan", "UnsupportedModel", "empirical_ntk", "layer_ntks", "plan", "sign_ntk"]


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduction: Reduction = "trace",
    engine: str = "auto",
    outputs: OutputsFn | None = None,
    params: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    precision: Precision = "double",
) -> Tensor:
    """The empirical NTK of a model in evaluation mode; the model, its gradients and the random state stay untouched.

    Args:
        model: any nn.Module whose outputs are [n, C] (or [n]).
        x1, x2: batches as a loader gives them; x2 None means x1.
        reduction: "trace" [n1, n2] (mean over outputs), "blocks" [C, n1, n2], "full" [n1, C, n2, C], or "sum" [n1, n2]
            (the pseudo-NTK: summed over all pairs of outputs, divided by C).
        engine: "auto", "layerwise" or "functional".
        outputs: `outputs(model, batch) -> [n, C]`, where calling the model does not return that.
        params: names or globs among the trained parameters.
        chunk_size: probes per block.
        precision: "double" computes Gram products in float64, "single" in the type of the factors.

    Returns:
        The kernel, detached, on the model's device; float64 under "double".

    Raises:
        UnsupportedModel: outputs are not [n, C], examples are coupled, or no engine supports the model.
        ValueError: an unknown reduction, engine or precision; a params glob without a match; no batch; or probes of a
            type or shape that the model rejects (the message names the module they reached).
    """
    return _kernel(model, x1, x2, reduction, None, engine, outputs, params, chunk_size, precision).value


def layer_ntks(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduction: Reduction = "trace",
    engine: str = "auto",
    outputs: OutputsFn | None = None,
    params: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    precision: Precision = "double",
) -> dict[str, Tensor]:
    """One kernel per trained parameter, by named_parameters() name (a tied parameter appears once).

    The kernels sum to `empirical_ntk`. Arguments, shapes and errors are those of `empirical_ntk`.
    """
    return _kernel(model, x1, x2, reduction, reduction, engine, outputs, params, chunk_size, precision).layers


def sign_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    reduction: Reduction = "trace",
    engine: str = "auto",
    outputs: OutputsFn | None = None,
    params: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    precision: Precision = "double",
) -> Tensor:
    """The kernel of sign descent, J₁ sign(J₂)ᵀ: the effect on one example of a step along another's gradient signs.

    Θ_sign[n, c, m, d] = ⟨∂f_c(x_n)/∂θ, sign(∂f_d(x_m)/∂θ)⟩. The kernel is asymmetric; its diagonal is ‖∂f_c(x_n)/∂θ‖₁,
    the largest magnitude of the row.

    Arguments, shapes and errors are those of `empirical_ntk`, except that reduction="sum" raises ValueError: it adds
    outputs before their signs exist.

    The layerwise engine holds one slab of J at a time, or the Jacobian of one parameter that no rule covers; the
    functional engine holds the Jacobian of a block of probes. A weight used at one position costs as much as in
    `empirical_ntk`; any other costs n²·C multiply-adds per entry.

    An entry that is zero up to rounding (a shift that a normalisation removes again) has the sign 0. The threshold is
    eps^¾ (1/256 in half precision) times the largest entry of that parameter's gradient. If a parameter's whole
    gradient is rounding error, its signs are arbitrary.

    Source: Malladi et al. 2023 (the asymmetric SignGD kernel).

    >>> import torch
    >>> sign_ntk(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    tensor([[3., 1.],
            [3., 3.]], dtype=torch.float64)
    """
    if reduction == "sum":
        raise ValueError("reduction='sum' adds outputs before their signs exist: take 'trace', 'blocks' or 'full'")
    found = _kernel(model, x1, x2, reduction, None, engine, outputs, params, chunk_size, precision, signed=True)
    return found.value


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
) -> Plan:
    """The plan of `empirical_ntk`: engine and reason, rule and cost per parameter, peak memory, probes per block.

    Seconds are predicted for an idle machine with the number of threads that the process has. The forward and backward
    passes are timed on a few probes, so their seconds vary slightly between calls. Everything else is computed from
    counts, and no decision depends on a timing.

    layers: the reduction of the kernels kept per parameter (as in `layer_ntks`); None keeps none. Other arguments are
    those of `empirical_ntk`.

    Raises:
        UnsupportedModel, ValueError: as in `empirical_ntk`.
    """
    check_reduction(reduction)
    if layers is not None:
        check_reduction(layers, "layers")
    network = Network(model, outputs, params)
    check_batch(x)
    wanted = Wanted(richest(reduction, layers), layers, precision, chunk_size)
    with leave_no_trace(network.module), explained(network, x), _or_of_fewer_parameters():
        chosen = CachedChoice(network, x, engine, chunk_size)
        with chosen:
            made = make_plan(chosen.choice, network, network.batch(x), wanted)
            chosen.store()
            return made


def _kernel(
    model: nn.Module,
    x1: Any,
    x2: Any,
    reduction: Reduction,
    layers: Reduction | None,
    engine: str,
    outputs: OutputsFn | None,
    params: str | Sequence[str] | None,
    chunk_size: int | None,
    precision: Precision,
    signed: bool = False,
) -> Kernel:
    check_reduction(reduction)
    network = Network(model, outputs, params)
    work_dtype(next(iter(network.parameters.values())).dtype, precision)
    for x in (x1, x2) if x2 is not None else (x1,):
        check_batch(x)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of probes ≥ 1, got {chunk_size!r}")
    with leave_no_trace(network.module), _or_of_fewer_parameters():
        with explained(network, x1):
            chosen = CachedChoice(network, x1, engine, chunk_size)
            x1 = network.batch(x1)
        with explained(network, x1 if x2 is None else x2), chosen:
            x2 = None if x2 is None else network.batch(x2)
            while True:
                found = chosen.choice.engine.kernel(
                    network, x1, x2,
                    reduction=reduction, layers=layers, chunk_size=chunk_size, precision=precision, signed=signed,
                )  # fmt: skip
                if chosen.store(found.value):
                    return found


@contextlib.contextmanager
def _or_of_fewer_parameters() -> Iterator[None]:
    """Adds params= to the advice of an OutOfMemory error; only the callers of this module's functions can pass it."""
    try:
        yield
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}, or part of the parameters with params=") from error

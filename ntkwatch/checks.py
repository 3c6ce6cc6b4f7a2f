"""What a monitor refuses before it measures: unknown choices, outputs that are not a kernel's, kernels too large."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction, richest
from ntkwatch.engines.memory import first_line, is_out_of_memory
from ntkwatch.guard import leave_no_trace
from ntkwatch.misfits import misfit
from ntkwatch.model import Network, UnsupportedModel

REDUCTIONS = ("trace", "blocks", "full", "sum")
ENGINES = ("auto", "functional", "layerwise")
LAYERS: Reduction = "trace"  # of the kernel per parameter that every probe keeps
FULL_LIMIT = 1e9  # bytes of one [nC, nC] float64 kernel


def check_choice(name: str, got: str, allowed: Sequence[str]) -> None:
    """Raises ValueError naming the argument, what it got and what it takes."""
    if got not in allowed:
        raise ValueError(f"{name}={got!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def check_arguments(
    reduction: str,
    engine: str,
    outputs: Any,
    loss: Any,
    hparams: Any,
    seed: Any,
    targets: Any = None,
    loggers: Any = None,
) -> None:
    """Raises ValueError for an argument of a value or kind that is not taken: what, what it got, what it takes."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("engine", engine, ENGINES)
    listed = isinstance(loggers, Iterable) and not isinstance(loggers, str)
    rows = (
        ("outputs", outputs, callable(outputs), "a callable (model, batch) -> [n, C], or None"),
        ("loss", loss, callable(loss), "a callable (outputs, targets) -> mean loss, or None"),
        ("hparams", hparams, isinstance(hparams, Mapping), "a mapping, as {'width': 256}, or None"),
        (
            "targets",
            targets,
            not isinstance(targets, str),
            "a tensor, or a callable of the batch, as lambda batch: batch['y']",
        ),
        ("loggers", loggers, listed, "a list of Lightning loggers, or None for the trainer's"),
    )
    for name, got, right, takes in rows:
        if got is not None and not right:
            raise ValueError(f"{name}={got!r} is not understood: pass {takes}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed={seed!r} is not understood: pass a whole number")


def count_outputs(network: Network, batch: Any, n: int, reduction: str) -> int:
    """C of the model's outputs [n, C] on the probes.

    Raises:
        ValueError: the model fails on the probes, outputs that are not finite, a full kernel above 1 GB.
        UnsupportedModel: outputs that are not [n, C].
        MemoryError: one forward pass of the probes is too much.
    """
    with leave_no_trace(network.module), torch.no_grad():
        outputs = _outputs(network, batch)
    bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"the model's outputs are not finite on {bad} of {len(outputs)} probes: "
            "look for NaN in the probe inputs or the weights"
        )
    rows, n_outputs = outputs.shape
    if rows != n:
        raise UnsupportedModel(
            f"the model gave {rows} rows of outputs for {n} probes: pass outputs=, a callable (model, batch) -> [n, C]"
        )
    if reduction == "full" and (why := too_large("full", n, n_outputs)):
        raise ValueError(f"{why}: use fewer probes or reduction='trace'")
    return int(n_outputs)


def _outputs(network: Network, batch: Any) -> Tensor:
    try:
        return network.outputs(batch)
    except UnsupportedModel:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(
                f"memory ran out in one forward pass of the probes ({first_line(error)}): take fewer probes"
            ) from error
        raise ValueError(
            misfit(network.module, batch, error)
            or f"the model failed on the probes ({type(error).__name__}: {error}): "
            "give probes= in the form of the loader's batches, or outputs=, a callable (model, batch) -> [n, C]"
        ) from error


def too_large(reduction: str, n: int, n_outputs: int) -> str | None:
    """Why a kernel of that reduction is not measured, None where it may be."""
    size = {"full": (n * n_outputs) ** 2, "blocks": n**2 * n_outputs}.get(reduction, n**2) * 8
    if size <= FULL_LIMIT:
        return None
    return f"the {reduction} kernel of {n} probes x {n_outputs} outputs takes {size / 1e9:.1f} GB (limit 1 GB)"


def to_measure(own: Reduction, needed: str, n: int, n_outputs: int) -> tuple[Reduction, str | None]:
    """The reduction to measure so that the run's own and what diagnostics need can be derived, and what is left out.

    Returns:
        The reduction, and in one sentence why a needed one is not measured (None where it is).
    """
    if n_outputs == 1:  # trace, sum, blocks and full are one kernel
        return own, None
    why = None
    wish: dict[str, tuple[Reduction, ...]] = {"full": ("full", "blocks"), "blocks": ("blocks",)}
    for wanted in wish.get(needed, ()):
        measured = richest(own, wanted)
        left_out = too_large(measured, n, n_outputs)
        if left_out is None:
            return measured, why
        why = why or left_out
    return own, why

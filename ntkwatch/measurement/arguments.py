"""What a monitor refuses before it measures: unknown choices, outputs that are not a kernel's, kernels too large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkwatch.engines.base import Reduction, richest
from ntkwatch.engines.memory import first_line, is_out_of_memory
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, UnsupportedModel, to_device
from ntkwatch.model.errors import explain_failure

REDUCTIONS = ("trace", "blocks", "full", "sum")
ENGINES = ("auto", "functional", "layerwise")
LAYERS: Reduction = "trace"  # of the kernel per parameter that every probe keeps
FULL_LIMIT = 1e9  # bytes of one [nC, nC] float64 kernel


def check_choice(name: str, got: str, allowed: Sequence[str]) -> None:
    """Raises ValueError naming the argument, what it got and what it takes."""
    if not isinstance(got, str) or got not in allowed:
        raise ValueError(f"{name}={got!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def check_arguments(reduction: str, engine: str, seed: Any, **others: Any) -> None:
    """Raises ValueError for an argument of a value or kind that is not taken: what, what it got, what it takes.

    others: by name, those of `TAKES`; None is taken for all but the REQUIRED ones.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("engine", engine, ENGINES)
    for name, got in {**others, "seed": seed}.items():
        right, takes = TAKES[name]
        if (got is not None or name in REQUIRED) and not right(got):
            raise ValueError(f"{name}={got!r} is not understood: pass {takes}")


def _flag(got: Any) -> bool:
    return isinstance(got, (bool, np.bool_))


def _seed(got: Any) -> bool:
    """What a torch.Generator takes."""
    return isinstance(got, int | np.integer) and not isinstance(got, bool) and -(2**63) <= int(got) < 2**64


def _targets(got: Any) -> bool:
    """A callable, or rows: a tensor, an array, a list."""
    rows = hasattr(got, "__array__") or (isinstance(got, Sequence) and not isinstance(got, str | bytes))
    return callable(got) or (rows and getattr(got, "ndim", 1) > 0)


def _loggers(got: Any) -> bool:
    """Told apart by what they offer, as `loggers.adapters` does."""
    listed = isinstance(got, Iterable) and not isinstance(got, str | Mapping | Iterator)
    return listed and all(hasattr(each, "log_metrics") and not isinstance(each, type) for each in got)


REQUIRED = ("model", "resample", "save_kernels", "seed")
TAKES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda got: isinstance(got, nn.Module), "an nn.Module, not its class or its outputs"),
    "outputs": (callable, "a callable (model, batch) -> [n, C], or None"),
    "loss": (callable, "a callable (outputs, targets) -> mean loss, or None"),
    "hparams": (lambda got: isinstance(got, Mapping), "a mapping, as {'width': 256}, or None"),
    "targets": (
        _targets,
        "a tensor [n, …], or a callable of the batch, as lambda batch: batch['y']",
    ),
    "loggers": (_loggers, "a list of Lightning loggers, or None for the trainer's"),
    "record": (lambda got: isinstance(got, str | PathLike), "a folder's path, or None"),
    "resample": (_flag, "True or False"),
    "save_kernels": (_flag, "True or False"),
    "seed": (_seed, "a whole number of 64 bits"),
}


def count_outputs(network: Network, batch: Any, reduction: str) -> int:
    """C of the model's outputs [n, C] on the probes.

    Raises:
        ValueError: the model fails on the probes, outputs that are not finite, a full kernel above 1 GB.
        UnsupportedModel: outputs that are not [n, C].
        MemoryError: one forward pass of the probes is too much.
    """
    with leave_no_trace(network.module), torch.no_grad():
        outputs = _outputs(network, to_device(batch, network.device))
    bad = int((~torch.isfinite(outputs)).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"the model's outputs are not finite on {bad} of {len(outputs)} probes: "
            "look for NaN in the probe inputs or the weights"
        )
    n, n_outputs = outputs.shape
    if reduction == "full" and (why := too_large("full", n, n_outputs)):
        raise ValueError(f"{why}: use fewer probes or reduction='trace'")
    return int(n_outputs)


def _outputs(network: Network, batch: Any) -> Tensor:
    try:
        return network.outputs(network.batch(batch))
    except UnsupportedModel:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(
                f"memory ran out in one forward pass of the probes ({first_line(error)}): take fewer probes"
            ) from error
        raise ValueError(
            explain_failure(network, batch, error)
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

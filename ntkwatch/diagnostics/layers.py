"""The same questions layer by layer: where in the network the kernel is, turns and aligns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ntkwatch.diagnostics.laziness import (
    feature_correlations,
    parameter_ratio,
    spectral_updates,
    update_correlations,
)
from ntkwatch.diagnostics.view import View, ask, known
from ntkwatch.engines.functional import is_out_of_memory
from ntkwatch.metrics.undefined import Undefined

# What is told by layer where a headline of that beginning was asked for.
DETAILS: dict[str, Callable[[View], Mapping[str, float]]] = {
    "spectral_update": spectral_updates,
    "neural_feature_correlation": feature_correlations,
    "neural_feature_correlation_update": update_correlations,
}
FAILURES = (RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError)


def defined(compute: Callable[[], Tensor | float]) -> tuple[float | None, str | None]:
    """(value, None), or (None, the reason)."""
    try:
        value = float(compute())
    except (Undefined, ValueError) as gap:  # ValueError: a kernel that a metric refuses, such as an indefinite one
        return None, str(gap)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return None, f"it failed ({type(error).__name__}: {error})"  # one number's failure costs no other number
    return (value, None) if math.isfinite(value) else (None, "it is not finite")


def layer_metrics(view: View, names: Sequence[str] = ()) -> dict[str, dict[str, float | None]]:
    """Module name -> share of the trace, kernel angle, alignment and parameter distance of its own parameters.

    names: the diagnostics asked for; those that have details by layer add them.
    """
    modules: dict[str, list[str]] = {}
    for name in view.layers:
        modules.setdefault(_module(name), []).append(name)
    found = {module: _layer(view, own) for module, own in modules.items()}
    for detail, of in DETAILS.items():
        if any(name in (detail, f"{detail}_mean", f"{detail}_max") for name in names):
            for key, value in _details(view, of).items():
                module = key if key in found else _module(key)
                if module in found:
                    found[module][detail] = value if math.isfinite(value) else None
    return found


def _details(view: View, of: Callable[[View], Mapping[str, float]]) -> Mapping[str, float]:
    try:
        return of(view)
    except (Undefined, ValueError):
        return {}
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return {}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


def _layer(view: View, names: Sequence[str]) -> dict[str, float | None]:
    kernel, start = (sum((k[name] for name in names), torch.zeros(())) for k in (view.layers, view.layers_0))
    computed: dict[str, Callable[[], Tensor | float]] = {
        "share": lambda: kernel.trace() / view.trace.trace(),
        "angle": lambda: ask("kernel_angle", kernel, start),
        "alignment": lambda: ask("centered_alignment", kernel, known(view.targets)),
        "parameter_distance": lambda: parameter_ratio(view, names),
    }
    return {name: defined(compute)[0] for name, compute in computed.items()}

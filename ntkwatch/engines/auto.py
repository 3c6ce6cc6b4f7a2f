"""Which engine, and why: a documented list that can be asked.

1. Where an example's output depends on the others of its batch, or is random, no engine is taken: there is no kernel.
2. An engine asked for by name is taken; layerwise is still checked, and a disagreement raises.
3. "auto" takes layerwise if its kernel agrees with plain per-example backward passes on a few probes.
4. Else functional, if torch.func can transform the model and agrees.
5. Else the model is refused with both reasons.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Engine
from ntkwatch.engines.functional import Functional, is_out_of_memory, math_attention
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.separation import check_uncoupled, few
from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of, take

_CHECKED_OUTPUTS = 8
_CHECK_BYTES = 1 << 30
# Relative to ‖Θ‖. Two correct float32 paths differ by 1e-6 to 1e-4 (a ReLU at 0 may fall either way); a forgotten use
# or a mixed-up layout is off by whole per cents.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 3e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Choice:
    """The engine, why it in one line, and its self-check's relative error on Θ (None: not checked)."""

    engine: Engine
    reason: str
    error: float | None


class Selected(Network):
    """A network that shows only some of its outputs."""

    def __init__(self, network: Network, columns: list[int]) -> None:
        self.__dict__.update(copy.copy(network.__dict__))
        self._columns = columns

    def _checked(self, result: Any, batch: Any) -> Tensor:
        return super()._checked(result, batch)[:, self._columns]


def choose(network: Network, x: Any, engine: str = "auto") -> Choice:
    """The engine for this model on these probes, by the list above.

    Raises:
        ValueError: an unknown engine.
        UnsupportedModel: no engine can do it; every reason is given.
    """
    if engine not in ("auto", "layerwise", "functional"):
        raise ValueError(f"engine must be 'auto', 'layerwise' or 'functional', got {engine!r}")
    with math_attention():
        check_uncoupled(network, x)
    if engine == "functional":
        return Choice(Functional(), "functional: asked for", None)
    layerwise = Layerwise()
    error, reason = _trial(layerwise, network, x)
    if error is not None and reason is None:
        asked = "asked for, and agrees" if engine == "layerwise" else "agrees"
        return Choice(layerwise, f"layerwise: {asked} with plain backward passes to {error:.0e}", error)
    if engine == "layerwise":
        raise UnsupportedModel(f"layerwise: {reason}")
    functional = Functional()
    other_error, other = _trial(functional, network, x)
    if other_error is not None and other is None:
        return Choice(functional, f"functional: {_short(reason)}", other_error)
    raise UnsupportedModel(f"{reason}" if reason == other else f"{reason}; and torch.func: {other}")


def _short(reason: str | None) -> str:
    return f"layerwise cannot do this model ({reason})"


def _trial(engine: Engine, network: Network, x: Any) -> tuple[float | None, str | None]:
    """(relative error of Θ, None) where it agrees; (error or None, why not) where it does not."""
    try:
        error = self_check(engine, network, x)
    except UnsupportedModel as refusal:
        return None, str(refusal)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError) as failure:
        if is_out_of_memory(failure):
            raise
        return None, f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}"
    tolerance = _TOLERANCE.get(next(iter(network.parameters.values())).dtype, 3e-3)
    if error <= tolerance:
        return error, None
    return error, f"the self-check found Θ off by {error:.1e} against plain backward passes"


def self_check(engine: Engine, network: Network, x: Any) -> float:
    """‖Θ − Θ_ref‖/‖Θ_ref‖ on a few probes and outputs, Θ_ref by one backward pass per example and output."""
    probes = few(x)
    with torch.no_grad():
        outputs = network.outputs(probes).shape[1]
    entries = sum(p.numel() for p in network.parameters.values())
    held = max(1, _CHECK_BYTES // (4 * entries * batch_size(inputs_of(probes))))
    count = min(outputs, _CHECKED_OUTPUTS, held)
    network = Selected(network, [i * outputs // count for i in range(count)])
    theta = engine.kernel(network, probes, reduction="full", layers=None).value
    reference = plain_kernel(network, probes)
    if not bool(torch.isfinite(reference).all()):
        raise UnsupportedModel("the model's outputs or gradients hold NaN or infinity on the probes")
    norm = float(reference.norm())
    return float((theta - reference).norm()) / norm if norm else float(theta.norm())


def plain_kernel(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> Tensor:
    """Θ [n, C, n, C] by torch.autograd.grad alone, one example and one output at a time."""
    n = batch_size(inputs_of(x))
    with math_attention():
        rows = [_gradients(network, take(x, slice(i, i + 1)), state) for i in range(n)]
    j = [torch.stack([row[name] for row in rows]).flatten(0, 1).double() for name in network.parameters]
    total = torch.stack([block @ block.T for block in j]).sum(0)
    return total.unflatten(0, (n, -1)).unflatten(2, (n, -1))


def _gradients(network: Network, one: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """{name: [C, P]} of one example."""
    f = network.outputs(one, state)[0]
    inputs = list(network.parameters.values())
    rows = []
    for value in f:
        grads = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs, strict=True)])
    return {
        name: torch.stack([row[i].to_dense().flatten() if row[i].is_sparse else row[i].flatten() for row in rows])
        for i, name in enumerate(network.parameters)
    }

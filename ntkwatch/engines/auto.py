"""Which engine, and why: a documented list that can be asked.

1. Where an example's output depends on the others of its batch, or is random, no engine is taken: there is no kernel.
2. An engine asked for by name is taken if it agrees with plain per-example backward passes on a few probes.
3. "auto" takes layerwise if it agrees so.
4. Else functional, if torch.func can transform the model and agrees.
5. Else the model is refused with both reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ntkwatch.engines.base import Engine
from ntkwatch.engines.coupling import check_uncoupled, of_some
from ntkwatch.engines.functional import USE_ANOTHER, Functional, math_attention
from ntkwatch.engines.graph import types_inside
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.memory import check_free, first_line, is_out_of_memory, ran_out
from ntkwatch.engines.selfcheck import self_check
from ntkwatch.engines.separation import few, leaves_at, outputs_at
from ntkwatch.model import Network, UnsupportedModel

# Relative to the kernel. Two correct float32 paths differ by 1e-6 to 1e-4 (a ReLU at 0 may fall either way); a
# forgotten use or a mixed-up layout is off by whole per cents. In float64, many a model still takes norms in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Choice:
    """The engine, why it in one line, and its self-check's relative error (None: not checked)."""

    engine: Engine
    reason: str
    error: float | None


def choose(network: Network, x: Any, engine: str = "auto") -> Choice:
    """The engine for this model on these probes, by the list above.

    Raises:
        ValueError: an unknown engine.
        UnsupportedModel: no engine can do it; every reason is given.
        MemoryError: a few probes are too many for the memory there is.
    """
    if engine not in ("auto", "layerwise", "functional"):
        raise ValueError(f"engine must be 'auto', 'layerwise' or 'functional', got {engine!r}")
    check_free(network.device)
    try:
        return _choose(network, x, engine)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    raise ran_out("in the self-check, which takes a few probes", network.device, reason)


def _choose(network: Network, x: Any, engine: str) -> Choice:
    with math_attention():
        with of_some(network, x):
            network.inside = types_inside(outputs_at(network, few(x), None, leaves_at(network, None)))
        check_uncoupled(network, x)
    reasons: list[str] = []
    for candidate in (Layerwise(uncoupled=True), Functional()):
        if engine not in ("auto", candidate.name):
            continue
        error, reason = _trial(candidate, network, x)
        if error is not None and reason is None:
            why = (
                f"layerwise cannot do this model ({reasons[0]}); "
                if reasons
                else "asked for, and " * (engine != "auto")
            )
            return Choice(candidate, f"{candidate.name}: {why}agrees with plain backward passes to {error:.0e}", error)
        said = str(reason).removesuffix(USE_ANOTHER if engine == "auto" else "")
        reasons.append(said if said in reasons else _whose(candidate, said, engine))
    raise UnsupportedModel("; and ".join(dict.fromkeys(reasons)))


def _whose(candidate: Engine, reason: str, asked: str) -> str:
    """The reason, with the engine's name where it is not clear."""
    if candidate.name == "functional":
        return reason if reason.startswith("torch.func") else f"torch.func: {reason}"
    return reason if asked == "auto" else f"layerwise: {reason}"


def _trial(engine: Engine, network: Network, x: Any) -> tuple[float | None, str | None]:
    """(relative error, None) where it agrees; (error or None, why not) where it does not."""
    try:
        error, worst = self_check(engine, network, x)
    except UnsupportedModel as refusal:
        return None, str(refusal)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError) as failure:
        if is_out_of_memory(failure):
            raise
        return None, first_line(failure)
    tolerance = _TOLERANCE.get(network.rounding(torch.float64), 3e-3)
    if error <= tolerance:
        return error, None
    return error, f"the self-check found it off by {error:.1e} against plain backward passes, most in {worst}"

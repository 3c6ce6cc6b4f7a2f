"""The choice of an engine, by a documented list, checked against plain backward passes.

1. If an example's output depends on the other examples of its batch, or is random, the model is refused: it has no
   per-example kernel. It is also refused if gradients arrive through `.grad`, where they cannot be separated by
   example.
2. An engine requested by name is used if it agrees with plain backward passes: entry by entry on a few probes, one
   example at a time (`selfcheck`), and in weighted sums over all probes (`sumcheck`).
3. "auto" uses layerwise if layerwise agrees.
4. Otherwise it uses functional, if torch.func can transform the model and functional agrees.
5. Otherwise layerwise runs one pass per example and output, unless layerwise refused the model itself
   (UnsupportedModel).
6. Otherwise the model is refused, with all reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ntkwatch.engines.base import Engine
from ntkwatch.engines.capture_points import few, leaves_at, outputs_at
from ntkwatch.engines.coupling import check_uncoupled, of_some
from ntkwatch.engines.functional import USE_ANOTHER, Functional, math_attention
from ntkwatch.engines.graph import types_inside
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.memory import check_free, first_line, is_out_of_memory, ran_out
from ntkwatch.engines.selfcheck import self_check
from ntkwatch.engines.sumcheck import SumCheck
from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of

# Relative to the kernel. Two correct float32 paths differ by 1e-6 to 1e-4 (a ReLU at 0 may fall either way); a
# missed use or a wrong layout is off by whole per cents. In float64, many models still compute norms in float32.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


_FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, IndexError, KeyError)


@dataclass(frozen=True)
class Choice:
    """The engine, a one-line reason, and the relative error of its self-check (None: not checked)."""

    engine: Engine
    reason: str
    error: float | None


@dataclass(frozen=True)
class _Trial:
    """The test of an engine: its error if known, why it is rejected, and whether the model itself is refused."""

    error: float | None = None
    why_not: str | None = None
    final: bool = False


def choose(network: Network, x: Any, engine: str = "auto", chunk_size: int | None = None) -> Choice:
    """The engine for this model on these probes, by the list above; checks use blocks of at most `chunk_size` probes.

    Raises:
        ValueError: an unknown engine.
        UnsupportedModel: no engine supports the model; the message gives every reason.
        MemoryError: too little memory for a few probes.
    """
    if engine not in ("auto", "layerwise", "functional"):
        raise ValueError(f"engine must be 'auto', 'layerwise' or 'functional', got {engine!r}")
    check_free(network.device)
    try:
        return _choose(network, x, engine, chunk_size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    raise ran_out("in the self-check, which runs on a few probes", network.device, reason)


def _choose(network: Network, x: Any, engine: str, chunk_size: int | None) -> Choice:
    with math_attention():
        with of_some(network, x):
            network.inside = types_inside(outputs_at(network, few(x), None, leaves_at(network, None)))
        check_uncoupled(network, x)
    sums = _sums(network, x, chunk_size)
    reasons: list[str] = []
    final = False
    for candidate in (Layerwise(uncoupled=True), Functional(), Layerwise(uncoupled=True, alone=True)):
        alone = isinstance(candidate, Layerwise) and candidate.alone
        if engine not in ("auto", candidate.name) or (alone and final):
            continue
        trial = _trial(candidate, network, x, sums)
        if trial.error is not None and trial.why_not is None:
            return Choice(candidate, _reason(candidate, trial.error, engine, reasons), trial.error)
        final = final or trial.final
        said = str(trial.why_not).removesuffix(USE_ANOTHER if engine == "auto" else "")
        reasons.append(said if said in reasons else _whose(candidate, said, engine))
    raise UnsupportedModel("; and ".join(dict.fromkeys(reasons)))


def _sums(network: Network, x: Any, chunk_size: int | None) -> SumCheck:
    """The plain backward passes over all probes."""
    try:
        return SumCheck(network, x, chunk_size)
    except _FAILURES as failure:
        if is_out_of_memory(failure) or isinstance(failure, UnsupportedModel):
            raise
        raise UnsupportedModel(f"a plain backward pass of the model fails: {first_line(failure)}") from failure


def _reason(engine: Engine, error: float, asked: str, reasons: list[str]) -> str:
    """Why this engine was chosen, in one line."""
    why = "asked for, and " if asked != "auto" else ""
    if reasons:
        why = f"layerwise cannot do this model ({reasons[0]}); "
    if isinstance(engine, Layerwise) and engine.alone:
        why = f"one pass for each example and output, as nothing else can do this model ({reasons[0]}); "
    return f"{engine.name}: {why}agrees with plain backward passes to {error:.0e}"


def _whose(candidate: Engine, reason: str, asked: str) -> str:
    """The reason, prefixed with the engine's name where that is ambiguous."""
    if candidate.name == "functional":
        return reason if reason.startswith("torch.func") else f"torch.func: {reason}"
    return reason if asked == "auto" else f"layerwise: {reason}"


def _trial(engine: Engine, network: Network, x: Any, sums: SumCheck) -> _Trial:
    """Compares the engine with plain backward passes: on a few probes, then on all."""
    try:
        error, worst = self_check(engine, network, x)
        if not _within(error, network):
            return _Trial(error, _off(error, worst, "plain backward passes"))
        if batch_size(inputs_of(x)) > batch_size(inputs_of(few(x))):
            more, worst = sums.error(engine)
            if not _within(more, network):
                return _Trial(more, _off(more, worst, "plain backward passes over all probes"))
            error = max(error, more)
        return _Trial(error)
    except UnsupportedModel as refusal:
        return _Trial(why_not=str(refusal), final=isinstance(engine, Layerwise))
    except _FAILURES as failure:
        if is_out_of_memory(failure):
            raise
        return _Trial(why_not=first_line(failure))


def _within(error: float, network: Network) -> bool:
    return error <= _TOLERANCE.get(network.rounding(torch.float64), 3e-3)


def _off(error: float, worst: str, what: str) -> str:
    return f"the self-check found it off by {error:.1e} against {what}, most in {worst}"

"""What a model returns → its output tensor; and where that is not [n, C], the code that makes it so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class UnsupportedModel(ValueError):
    """A model whose per-example kernel does not exist, or that an engine cannot do; the message says what to change."""


class Output(NamedTuple):
    """The output tensor, and its place in what the model returned, in Python."""

    tensor: Tensor
    place: str


def as_output(result: Any, call: str = "model(batch)", n: int | None = None) -> Output:
    """The output of a tensor, a `.logits` or ["logits"] holder, or a tuple (its first).

    call: how the model was called, in Python, and n: how many examples it was given, for the error.

    Raises:
        UnsupportedModel: there is none of these.
    """
    if isinstance(result, Tensor):
        return Output(result, "")
    logits, place = getattr(result, "logits", None), ".logits"
    if logits is None and isinstance(result, Mapping):
        logits, place = result.get("logits"), "['logits']"
    if logits is None and isinstance(result, tuple | list) and result:
        logits, place = result[0], "[0]"
    if isinstance(logits, Tensor):
        return Output(logits, place)
    codes = (rows_expression(tensor, call + place, n) for place, tensor in _other_tensors(result))
    raise UnsupportedModel(
        f"the model returned {type(result).__name__}, which holds no tensor under .logits, ['logits'] or first place; "
        f"{outputs_advice(next((code for code in codes if code is not None), None))}"
    )


def _other_tensors(result: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a model returned under other names, and where, in Python."""
    if isinstance(result, Mapping):
        held = [(f"[{key!r}]", value) for key, value in result.items()]
    elif isinstance(result, tuple | list):
        held = [(f"[{i}]", value) for i, value in enumerate(result)]
        held += [(f"[{i}]{inner}", value) for i, each in enumerate(result) for inner, value in _other_tensors(each)]
    else:
        held = [(f".{name}", value) for name, value in getattr(result, "__dict__", {}).items()]
    yield from ((place, value) for place, value in held if isinstance(value, Tensor))


def rows_expression(f: Tensor, code: str, n: int | None) -> str | None:
    """Code whose value is [n, C] or [n], of code whose value is f; None where it is not known how."""
    if f.is_complex():
        return f"torch.view_as_real({code}).flatten(1)"
    if f.ndim == 0 or f.numel() == 0 or not f.is_floating_point():
        return None
    if n is None or len(f) == n:
        return code + {1: "", 2: "", 3: ".mean(1)"}.get(f.ndim, ".flatten(2).mean(2)")
    if f.ndim == 2 and len(f) % n == 0:
        return f"{code}.unflatten(0, (-1, {len(f) // n})).flatten(1)"
    return f"{code}.mean(0)" if f.ndim == 3 and f.shape[1] == n else None


def outputs_advice(code: str | None) -> str:
    """What to pass as outputs=, where the code is known."""
    if code is None:
        return "pass as outputs= a function of model and batch that returns [n, C]"
    return f"pass outputs=lambda model, batch: {code}, or another function that returns [n, C]"

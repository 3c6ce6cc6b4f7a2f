"""What a metric does where its arguments do not define it: NaN for arithmetic, one sentence for people.

A metric raises `Undefined` where it stops having a value. Called plainly it then returns NaN; asked through
`why_undefined` it says why. Both run the same code, so a NaN and its reason cannot disagree.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_BARE: dict[str, Callable[..., object]] = {}


class Undefined(ArithmeticError):
    """The reason, one sentence; `value` holds what is defined all the same (NaN elsewhere), if anything is."""

    def __init__(self, reason: str, value: object = None) -> None:
        super().__init__(reason)
        self.value = value


def nan(*args: object, **kwargs: object) -> Tensor:
    """A 0-d float64 NaN on the device of the first tensor among the arguments."""
    device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    return torch.tensor(float("nan"), dtype=torch.float64, device=device)


def metric(undefined: Callable[..., Any] = nan) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function a metric. `undefined`, called with the metric's arguments, gives its NaN-filled result."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        _BARE[function.__name__] = function

        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except Undefined as gap:
                return gap.value if gap.value is not None else undefined(*args, **kwargs)  # type: ignore[return-value]

        return guarded

    return decorate


def why_undefined(name: str, *args: object, **kwargs: object) -> str | None:
    """Why a metric is NaN (wholly or in part) at these arguments, in one sentence; None where it is defined.

    Raises ValueError for a name that is not a metric, and whatever the metric raises for wrong arguments.

    >>> why_undefined("centered_alignment", torch.eye(4), torch.ones(4, 1))
    'the targets are constant over the probes'
    >>> why_undefined("kernel_angle", torch.eye(4), torch.eye(4)) is None
    True
    """
    if name not in _BARE:
        close = ", ".join(difflib.get_close_matches(name, _BARE, n=3)) or ", ".join(sorted(_BARE))
        raise ValueError(f"name must be a metric; got {name!r}; did you mean one of: {close}?")
    try:
        _BARE[name](*args, **kwargs)
    except Undefined as gap:
        return str(gap)
    return None

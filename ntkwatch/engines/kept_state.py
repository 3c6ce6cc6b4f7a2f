"""State that a model keeps between calls: the attributes that a forward pass writes, and code that resets them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, str]  # a module's name and an attribute's
_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}
_DEPTH = 4  # nesting depth of containers and objects
_TRIED = 64  # combinations of resets at most


def written(module: nn.Module, forward: Callable[[], object]) -> list[Place]:
    """The attributes, including buffers, that a forward pass changes, as (module name, attribute name)."""
    before = _look(module)
    forward()
    after = _look(module)
    return [place for place in after if place not in before or not _same(before[place], after[place])]


@dataclass(frozen=True)
class Reset:
    """One attribute set to a possible initial value: as code on `model`, and as a function."""

    code: str
    do: Callable[[], object]


def resets(module: nn.Module, places: Sequence[Place], repeats: Callable[[Sequence[Reset]], bool]) -> str | None:
    """Code that resets the attributes so that calls agree, tested by `repeats`; None if no combination works."""
    ways = itertools.product(*(_options(module, place) for place in places))
    for way in itertools.islice(ways, _TRIED):
        if repeats(way):
            return ", ".join(reset.code for reset in _needed(way, repeats))
    return None


def _needed(way: Sequence[Reset], repeats: Callable[[Sequence[Reset]], bool]) -> Sequence[Reset]:
    """The resets without unnecessary ones, of attributes that are written and never read."""
    for each in way:
        rest = [other for other in way if other is not each]
        if rest and repeats(rest):
            way = rest
    return way


def _options(module: nn.Module, place: Place) -> list[Reset]:
    owner, (prefix, name) = module.get_submodule(place[0]), place
    value = getattr(owner, name, None)
    said = _owner(prefix)
    values: list[tuple[str, Callable[[], Any]]] = [("None", lambda: None)]
    if isinstance(value, Tensor):
        values.append((f"torch.zeros_like({said}.{name})", lambda: torch.zeros_like(value)))
    elif isinstance(value, list | tuple | dict):
        values.append((repr(type(value)()), lambda: type(value)()))
    elif isinstance(value, bool | int | float | str):
        values.insert(0, (repr(type(value)()), lambda: type(value)()))
    return [Reset(f"setattr({said}, {name!r}, {code})", partial(_set, owner, name, make)) for code, make in values]


def _set(owner: nn.Module, name: str, make: Callable[[], Any]) -> None:
    setattr(owner, name, make())


def _owner(name: str) -> str:
    """The Python expression of a submodule."""
    if not name:
        return "model"
    parts = name.split(".")
    return f"model.{name}" if all(part.isidentifier() for part in parts) else f"model.get_submodule({name!r})"


def _look(module: nn.Module) -> dict[Place, Any]:
    found = {}
    for prefix, owner in module.named_modules():
        held = {name: value for name, value in vars(owner).items() if name not in _INTERNAL and name != "_buffers"}
        for name, value in {**held, **owner._buffers}.items():
            found[prefix, name] = _copy(value, _DEPTH)
    return found


def _copy(value: Any, depth: int) -> Any:
    """A copy of the tensors, numbers and strings in a value; other objects by their identity."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and depth:
        return {str(key): _copy(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set) and depth:
        return [_copy(item, depth - 1) for item in value]
    if depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
        return {name: _copy(item, depth - 1) for name, item in vars(value).items()}
    return id(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)

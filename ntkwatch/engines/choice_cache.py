"""A cache of the chosen engine for the life of a module object, so that its checks run once.

The key holds everything that the choice depends on except the values of weights and probes: the module's structure with
its attributes and hooks, the trained parameters, the form of the batch, `outputs=`, and torch's global modes. If
something cannot be compared safely, nothing is cached.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.engines.auto import Choice, choose
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.layerwise import Layerwise, Reading
from ntkwatch.model import Network, leaves
from ntkwatch.model.calling import form_of

_ENTRIES = 8  # per module
_DEPTH = 3  # nesting depth of containers, objects and functions that are compared by their contents
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    enum.Enum,
)
_CACHE: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, _Entry]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Entry:
    """A choice without a reference to its module."""

    forms: Any  # see `Network.forms`
    engine: str
    reading: Reading | None
    reason: str
    error: float | None


class _Same:
    """An object compared by identity; unequal to everything once it has been deleted."""

    def __init__(self, value: Any) -> None:
        self._ref, self._hash = weakref.ref(value), id(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._ref() is not None and self._ref() is other._ref()

    def __hash__(self) -> int:
        return self._hash


class _NotComparable(Exception):
    """The key would contain an object that can be compared neither by value nor safely by identity."""


class CachedChoice:
    """The engine for a network on a batch, cached or newly chosen; the caller holds the guard.

    Attributes:
        choice: the engine and the reason.
        remembered: whether an earlier call chose it.
    """

    def __init__(self, network: Network, x: Any, engine: str, chunk_size: int | None) -> None:
        """x: the batch as the caller passed it."""
        self._arguments = network, x, engine, chunk_size
        self._key = _key(*self._arguments)
        entries = _CACHE.get(network.module, OrderedDict())
        entry = entries.get(self._key) if self._key is not None else None
        self.remembered = entry is not None
        self.choice = self._restored(entry) if entry is not None else self._made()
        self._graphs = self._reading_graphs()

    def store(self, kernel: Tensor | None = None) -> bool:
        """Caches the choice after it has computed a kernel (or a plan).

        Returns:
            Whether that kernel is valid. It is not if a cached choice met a graph on which it was not checked, or
                returned values that are not finite. Then the engine is chosen again, or the model is refused.
        """
        network = self._arguments[0]
        unlike = not self._reading_graphs() <= self._graphs
        if self.remembered and (unlike or (kernel is not None and not bool(kernel.isfinite().all()))):
            self.remembered, self.choice = False, self._made()
            self._graphs = self._reading_graphs()
            return False
        if self._key is not None:
            entries = _CACHE.setdefault(network.module, OrderedDict())
            entries[self._key] = self._entry()
            entries.move_to_end(self._key)
            while len(entries) > _ENTRIES:
                entries.popitem(last=False)
        return True

    def __enter__(self) -> CachedChoice:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Removes the choice from the cache after a failure."""
        if kind is not None:
            _CACHE.get(self._arguments[0].module, OrderedDict()).pop(self._key, None)

    def _made(self) -> Choice:
        network, x, engine, chunk_size = self._arguments
        return choose(network, network.batch(x), engine, chunk_size)

    def _entry(self) -> _Entry:
        network, choice = self._arguments[0], self.choice
        reading = choice.engine.reading(network) if isinstance(choice.engine, Layerwise) else None
        return _Entry(network.forms, choice.engine.name, reading, choice.reason, choice.error)

    def _restored(self, entry: _Entry) -> Choice:
        network = self._arguments[0]
        network.forms = entry.forms
        if entry.reading is None:
            return Choice(Functional(), entry.reason, entry.error)
        return Choice(Layerwise.restored(network, entry.reading), entry.reason, entry.error)

    def _reading_graphs(self) -> frozenset[tuple[str, ...]]:
        """Signatures of the graphs in which examples were separated."""
        engine = self.choice.engine
        return engine.graphs(self._arguments[0]) if isinstance(engine, Layerwise) else frozenset()


def _key(network: Network, x: Any, engine: str, chunk_size: int | None) -> Hashable | None:
    """Everything the choice depends on; None if it cannot be compared."""
    try:
        batch = (form_of(x), tuple(_form(leaf, 1) for leaf in leaves(x)))
        structure = tuple((name, _module(module)) for name, module in network.module.named_modules())
        own = _form(network.custom, _DEPTH)
        key = batch, structure, tuple(network.parameters), own, engine, chunk_size, _modes()
        hash(key)
        return key
    except (_NotComparable, TypeError):
        return None


def _modes() -> Hashable:
    """Torch's global modes that affect a forward pass and that the guard leaves as they are."""
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


def _module(module: nn.Module) -> Hashable:
    """A module's own attributes, including hooks; its children have their own entries."""
    held = tuple((name, _form(value, _DEPTH)) for name, value in vars(module).items() if name != "_modules")
    forward = inspect.getattr_static(type(module), "forward", None)
    return _Same(module), None if forward is None else _Same(forward), held


def _form(value: Any, depth: int) -> Hashable:
    """A comparable form of a value: tensors by shape and type, containers by their contents, other objects by identity.

    Raises:
        _NotComparable: neither is possible.
    """
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        own = _Same(value) if isinstance(value, nn.Parameter) else None
        return own, value.shape, value.dtype, value.device, value.layout, value.requires_grad
    if isinstance(value, weakref.ReferenceType):
        return weakref.ReferenceType, _form(value(), depth)
    if isinstance(value, nn.Module | type | types.ModuleType | types.BuiltinFunctionType):
        return _Same(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if not value:
            return type(value)
        if depth == 0:
            raise _NotComparable
        items = list(value.items()) if isinstance(value, Mapping) else list(value)
        return type(value), tuple(_form(item, depth - (not isinstance(value, tuple))) for item in items)
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        return _function(value, depth)
    return _object(value, depth)


def _function(value: Any, depth: int) -> Hashable:
    """A function by its code and everything it reads, because a lambda is a new object in each call."""
    if depth == 0:
        return _Same(value)
    if isinstance(value, functools.partial):
        return "partial", _form(value.func, depth), _form([*value.args, *value.keywords.items()], depth)
    if isinstance(value, types.MethodType):
        return "method", _Same(value.__self__), _function(value.__func__, depth)
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    used = [value.__globals__.get(name) for name in value.__code__.co_names]
    read = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *cells, *used]
    return value.__code__, tuple(_form(each, depth - 1) for each in read)


def _object(value: Any, depth: int) -> Hashable:
    """Any other object: its identity, with the plain values it holds now, alone or in containers."""
    held = getattr(value, "__dict__", {}) if depth else {}
    try:
        return _Same(value), tuple((name, _plain(item)) for name, item in held.items())
    except TypeError:
        raise _NotComparable from None


def _plain(value: Any, depth: int = _DEPTH) -> Hashable:
    """The plain values in a value and in its containers."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if depth and isinstance(value, Mapping):
        return tuple((key, _plain(item, depth - 1)) for key, item in value.items())
    if depth and isinstance(value, list | tuple | set | frozenset):
        return tuple(_plain(item, depth - 1) for item in value)
    return None

"""What of a batch goes into `forward`, and what is the target: DESIGN's "Batch to outputs", without a guess.

Of a tuple, as many leading items as forward requires (at least one) are inputs and the next is the target. Of a
mapping, what forward names goes in, without the labels that it does not require. What is left is ignored, and said.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.model.batch import LABEL_KEYS, is_per_example, leaves

Place = tuple[Any, ...]  # keys and numbers that lead to a part of a batch; () is the whole
WHOLE_NAMES = ("batch",)  # an argument of this name takes a whole tuple, as training_step does


@dataclass(frozen=True)
class Signature:
    """The arguments of a forward: those by place without a default, all named ones, and whether there may be more."""

    required: tuple[str, ...]
    named: tuple[str, ...]
    more: bool  # *args
    keywords: bool  # **kwargs

    @classmethod
    def of(cls, module: nn.Module) -> Signature:
        """That of the module's forward; anything goes where Python cannot tell."""
        try:
            arguments = list(inspect.signature(module.forward).parameters.values())
        except (TypeError, ValueError):
            return cls((), (), True, True)
        by_place = [p for p in arguments if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p for p in arguments if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        kinds = {p.kind for p in arguments}
        return cls(
            tuple(p.name for p in by_place if p.default is p.empty),
            tuple(p.name for p in named),
            inspect.Parameter.VAR_POSITIONAL in kinds,
            inspect.Parameter.VAR_KEYWORD in kinds,
        )

    @property
    def leading(self) -> int:
        """How many leading items of a tuple are inputs."""
        return max(1, len(self.required))

    @property
    def whole(self) -> bool:
        """Whether its one argument is named for a whole batch."""
        return len(self.required) == 1 and self.required[0] in WHOLE_NAMES


@dataclass(frozen=True)
class Reading:
    """Where in a batch the arguments are, and the target. named: argument → place; target: None where there is none."""

    args: tuple[Place, ...] = ()
    named: tuple[tuple[str, Place], ...] = ()
    target: Place | None = None

    def call(self, module: nn.Module, batch: Any) -> Any:
        """The module called on the batch."""
        return module(*(at(batch, p) for p in self.args), **{name: at(batch, p) for name, p in self.named})

    def inputs(self, batch: Any) -> list[Any]:
        """The parts that go in."""
        return [at(batch, place) for place in self.places]

    @property
    def places(self) -> tuple[Place, ...]:
        """Of all that goes in."""
        return (*self.args, *(place for _, place in self.named))

    def targets(self, batch: Any) -> Tensor | None:
        """The targets as they are in the batch, None where there are none."""
        return None if self.target is None else as_tensor(at(batch, self.target))

    def code(self, part: Callable[[Place], str] | None = None) -> str:
        """The call in Python, of `model` and `batch`, or of what `part` writes for a place."""
        write = as_python if part is None else part
        by_name = [f"{name}={write(place)}" for name, place in self.named]
        return f"model({', '.join([*(write(place) for place in self.args), *by_name])})"


def at(batch: Any, place: Place) -> Any:
    """The part of a batch at a place."""
    for key in place:
        batch = batch[key]
    return batch


def as_python(place: Place, of: str = "batch") -> str:
    """A place in Python."""
    return of + "".join(f"[{key!r}]" for key in place)


def places_of_tensors(value: Any, within: Place = ()) -> Iterator[Place]:
    """Where tensors are, at the top or one below it."""
    if isinstance(value, Tensor):
        yield within
    elif isinstance(value, Mapping | tuple | list) and len(within) < 2:
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from places_of_tensors(item, (*within, key))


def likely_targets(batch: Any) -> Tensor | None:
    """The targets as long as no model is known: the value under a label key, or the last item of a tuple."""
    if isinstance(batch, Mapping):
        return as_tensor(next((batch[key] for key in LABEL_KEYS if key in batch), None))
    return as_tensor(batch[-1]) if isinstance(batch, tuple | list) and len(batch) > 1 else None


def as_tensor(value: Any) -> Tensor | None:
    """A tensor of what holds numbers, None of anything else."""
    if value is None or isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def readings(signature: Signature, batch: Any) -> Iterator[Reading]:
    """How the batch may go in, the likeliest first: the next only where a model does not run on the one before."""
    if isinstance(batch, Mapping):
        yield from _of_mapping(signature, batch)
    elif isinstance(batch, tuple | list) and batch and not signature.whole:
        yield from _of_tuple(signature, batch)
    else:
        target = _target(batch, 1) if isinstance(batch, tuple | list) else None
        yield Reading(((),), target=target)


def _of_tuple(signature: Signature, batch: Any) -> Iterator[Reading]:
    n, first = signature.leading, batch[0]
    nested = isinstance(first, tuple | list) and bool(first) and not isinstance(first[0], str)
    if nested and len(signature.required) == len(first) > 1:  # ((x1, x2), y) of a forward of two
        yield Reading(tuple((0, i) for i in range(n)), target=_target(batch, 1))
        return
    yield Reading(tuple((i,) for i in range(min(n, len(batch)))), target=_target(batch, n))
    if signature.more:  # *args: as many as whatever is inside requires
        for k in range(n + 1, len(batch) + 1):
            yield Reading(tuple((i,) for i in range(k)), target=_target(batch, k))
    if nested and n == 1:  # ((view, view), y) of a forward of one: the first view
        yield Reading(((0, 0),), target=_target(batch, 1))


def _target(batch: Any, start: int) -> Place | None:
    """The first item from there that holds a number, or numbers, for each example; a list of paths does not."""
    n = next((len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    return next(((i,) for i in range(start, len(batch)) if is_per_example(as_tensor(batch[i]), n)), None)


def _of_mapping(signature: Signature, batch: Mapping[Any, Any]) -> Iterator[Reading]:
    required = [name for name in signature.required if name in batch]
    labels = [key for key in LABEL_KEYS if key in batch]
    target: Place | None = next(((key,) for key in labels if key not in required), None)
    sole = [key for key, value in batch.items() if key not in labels and isinstance(value, Tensor) and value.ndim]
    fits = required or not signature.required
    named = [key for key in batch if key in signature.named or (signature.keywords and key in sole)]
    without = [key for key in named if key in required or key not in labels]
    if fits and named:
        yield Reading(named=tuple((key, (key,)) for key in without), target=target)
        if len(without) < len(named):  # an encoder–decoder reads the labels in order to run at all
            yield Reading(named=tuple((key, (key,)) for key in named), target=target)
    if not fits or signature.more or not named:
        yield Reading(((),), target=target)
        if len(sole) == 1:
            yield Reading(((sole[0],),), target=target)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_value(value: Any) -> str:
    """Type and shape of a part of a batch: "float32 [64, 8]"."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, tuple | list) and not (value and isinstance(value[0], str)):
        return f"{type(value).__name__} of {', '.join(describe_value(item) for item in value)}"
    return f"{type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list) else ''}"


def name_of(batch: Any, place: Place) -> str:
    """A part of a batch by name: "y", "item 2 of 3", "item 1 of item 1"."""
    if not place:
        return "the batch"
    *outer, key = place
    parent = at(batch, tuple(outer))
    if isinstance(parent, Mapping):
        return str(key)
    field = f"{parent._fields[key]}, " if hasattr(parent, "_fields") else ""
    return f"{field}item {key + 1} of {name_of(batch, tuple(outer)) if outer else len(parent)}"


def describe_inputs(reading: Reading, signature: Signature, batch: Any) -> str:
    """What goes in, with type and shape, by the names of forward's arguments where these are known."""
    names = [*signature.required, *("" for _ in reading.args)]
    parts = [
        f"{name or name_of(batch, p)} {describe_value(at(batch, p))}"
        for name, p in zip(names, reading.args, strict=False)
    ]
    return ", ".join([*parts, *(f"{name} {describe_value(at(batch, p))}" for name, p in reading.named)])


def ignored_parts(reading: Reading, batch: Any) -> list[str]:
    """The parts of the batch, and of its items that are used in part, that are neither inputs nor target, by name."""
    used = {*reading.places, *([reading.target] if reading.target is not None else [])}
    if () in used or not isinstance(batch, Mapping | tuple | list):
        return []
    left: list[Place] = []
    for key in _keys(batch):
        inner = [place for place in used if place[:1] == (key,)]
        if not inner:
            left.append((key,))
        elif (key,) not in inner:
            taken = {place[1] for place in inner}
            left += [(key, other) for other in _keys(batch[key]) if other not in taken]
    return [name_of(batch, place) for place in left]


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Mapping) else list(range(len(value)))

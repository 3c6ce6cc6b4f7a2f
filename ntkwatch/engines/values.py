"""What operations ask of values: noted where there are some, and answered so where tensors have only a shape.

A mask's `nonzero`, `unique`, a comparison that an `if` takes: their results, or the shapes of these, are in no shape of
what goes in. A pass over real tensors notes them, in order, and a pass of the same model over tensors without memory
is told them again. Rows that a boolean mask selects are noted by how many the mask holds, which answers for every other
tensor that it selects from as well, in backward passes too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
_SCALAR = aten._local_scalar_dense.default
_MASKS = (torch.bool, torch.uint8)
_PACK = aten._pack_padded_sequence.default  # is not marked, and what comes after it reads its whole numbers


@cache
def _asks(func: Any) -> bool:
    """Whether a result, or its shape, depends on values; of operations that are not torch's own that is not known."""
    marked = any(tag in func.tags for tag in _VALUES) or func is _PACK
    return marked or func.namespace not in ("aten", "prim", "prims")


class Answers:
    """Results of operations that depend on values, in the order in which a pass over real tensors asked for them."""

    def __init__(self) -> None:
        self._noted: dict[Any, list[Any]] = {}
        self._given: dict[Any, int] = {}
        self._held: Any = WeakIdKeyDictionary()  # storages of masks → which of their views hold how many

    def __bool__(self) -> bool:
        return bool(self._noted)

    def again(self, before: Answers | None = None) -> Answers:
        """The same from the beginning; masks that were asked for `before` stay known."""
        copy = Answers()
        copy._noted = self._noted
        if before is not None:
            copy._held = before._held
        return copy

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Takes down what a real operation gave, if shapes do not tell it."""
        if not _asks(func):
            return
        if func is aten.index.Tensor:
            for mask in _masks(args[1]):
                self._count(mask, partial(self._counted, mask))
        else:
            self._put(_key(func, args, kwargs), tree_map_only(Tensor, _read if func is _PACK else Described, result))

    def note_list(self, values: Any) -> None:
        """Takes down numbers that were read out of a tensor all at once."""
        for value in tree_leaves(values):
            self._put(_SCALAR, value)

    def _put(self, key: Any, answer: Any) -> None:
        self._noted.setdefault(key, []).append(answer)

    def _counted(self, mask: Tensor, key: Any) -> int:
        count = int(mask.count_nonzero())
        self._put(key, count)
        return count

    def give(self, func: Any, args: Any, kwargs: Any) -> Callable[[], Any] | None:
        """What gives the result on tensors without memory, if it was noted; they are taken in turn, over and over."""
        if not self._noted or not _asks(func):
            return None
        if func is aten.index.Tensor:
            masks = _masks(args[1])
            if not masks or any(("mask", tuple(mask.shape)) not in self._noted for mask in masks):
                return None
            return lambda: func(args[0], self._without_masks(args[1]), *args[2:])
        key = _key(func, args, kwargs)
        if key not in self._noted:
            return None
        return lambda: tree_map_only(Described, Described.made, self._next(key))

    def _next(self, key: Any) -> Any:
        noted, place = self._noted[key], self._given.get(key, 0)
        self._given[key] = place + 1
        return noted[place % len(noted)]

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The same rows by their numbers."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in _MASKS:
                found.append(index)
                continue
            found.extend(
                [torch.empty(self._count(index, self._next), dtype=torch.long, device=index.device)] * index.ndim
            )
        return found

    def _count(self, mask: Tensor, find: Callable[[Any], int]) -> int:
        """How many it holds: as many as the last time, where it is one that was asked for before."""
        counts = self._held.setdefault(mask.untyped_storage(), {})
        view = (mask._version, mask.storage_offset(), mask.shape, mask.stride())
        if view not in counts:
            counts[view] = find(("mask", tuple(mask.shape)))
        return int(counts[view])


class Lists(TorchFunctionMode):
    """Notes the numbers that are read out of a tensor all at once, which no operation is called for."""

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.tolist:
            self._answers.note_list(result)
        return result


class Described:
    """A tensor's shape, strides, type and device, and another tensor of these."""

    def __init__(self, t: Tensor) -> None:
        self._layout, self._dtype, self._device = (tuple(t.shape), t.stride()), t.dtype, t.device

    def made(self) -> Tensor:
        return torch.empty_strided(*self._layout, dtype=self._dtype, device=self._device)


def _read(t: Tensor) -> Described | Tensor:
    """Whole numbers with their values."""
    return Described(t) if t.is_floating_point() else t.clone()


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """A question: what is asked for, of which shapes; a number is asked of a tensor without any."""
    if func is _SCALAR:
        return func
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return (func, *((tuple(t.shape), t.dtype) for t in given))


def _masks(indices: Sequence[Tensor | None]) -> list[Tensor]:
    return [index for index in indices if index is not None and index.dtype in _MASKS]

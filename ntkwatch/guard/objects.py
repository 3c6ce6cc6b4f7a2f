"""Objects of the user's that are called outside training: a dataset that is indexed, a collate function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ntkwatch.guard.process import guard_generators
from ntkwatch.guard.values import SavedContainers, Undo, generators_of, is_container, put_back, same, stateful

_DEPTH = 6  # dataset, subset of it, its transform, the list in it, one of them, its generator
_CALLED = ("__getitem__", "__call__", "forward")
_PASSED = (Tensor, type, ModuleType, str, bytes)
_ITEMS = 64  # of a list or dict: transforms are few, samples are many


@contextmanager
def preserve_objects(*objects: object) -> Iterator[None]:
    """After it, `objects` and the process's random state are as before, whatever indexing and calling them did.

    Of the objects themselves, and of the datasets in them, every attribute and what lists and dicts hold comes back: a
    counter, a cache, a file that is opened at first use (left open, it would break in a worker that is forked later).
    Of what they hold further down, such as transforms, only random generators do.
    """
    undo: list[Undo] = []
    try:
        guard_generators(undo)
        _guard_objects(objects, undo)
        yield
    finally:
        for trouble in put_back(undo):
            raise trouble


def _guard_objects(objects: tuple[object, ...], undo: list[Undo]) -> None:
    boxes, seen = SavedContainers(), set[int]()
    undo.append(boxes.restore)
    todo: list[tuple[object, int]] = [(getattr(value, "__self__", value), 0) for value in objects]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen or depth > _DEPTH or isinstance(value, _PASSED):
            continue
        seen.add(id(value))
        for function in (value, *(getattr(type(value), name, None) for name in _CALLED)):
            todo.extend((generator, depth) for generator in generators_of(function))
        if (restore := stateful(value)) is not None:
            undo.append(restore)
        elif is_container(value) or isinstance(value, tuple):
            items: Any = value.values() if isinstance(value, dict) else value
            todo.extend((item, depth + 1) for item in islice(items, _ITEMS))
        elif isinstance(held := getattr(value, "__dict__", None), dict):
            todo.extend((item, depth + 1) for item in held.values())
            if depth == 0 or isinstance(value, torch.utils.data.Dataset):
                undo.append(partial(_restore, held, dict(held)))
                for box in filter(is_container, held.values()):
                    boxes.keep(box)


def _restore(held: dict[str, Any], saved: dict[str, Any]) -> None:
    if not same(held, saved):
        held.clear()
        held.update(saved)

"""A batch as a tree of leaves: how many examples it holds, which leaves have a row for each, and some of its rows.

A raw batch is what a loader gives; a leaf of it counts as one row per example where its first side is n. A `Batch`
knows more, since a network has settled it: `Network.batch`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LABEL_KEYS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Batch:
    """A batch that a network has settled.

    value: in the form that the loader gives. n: how many examples. rows, differentiated: of each leaf in order,
    whether it holds a row for each example, and whether it came with requires_grad, as collocation points do.
    """

    value: Any
    n: int
    rows: tuple[bool, ...]
    differentiated: tuple[bool, ...]

    @classmethod
    def of(cls, raw: Any, n: int, rows: Sequence[bool]) -> Batch:
        """A raw batch whose leaves that require grad are cut off from the user's tensors."""
        asked = tuple(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(raw))
        value = map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, raw) if any(asked) else raw
        return cls(value, n, tuple(rows), asked)

    def fresh(self) -> Any:
        """The value for one forward pass: leaves to differentiate by are new ones, that require grad."""
        if not any(self.differentiated):
            return self.value
        asked = iter(self.differentiated)
        return map_leaves(lambda leaf: leaf.detach().requires_grad_() if next(asked) else leaf, self.value)

    def per_example(self) -> list[Tensor]:
        """The tensors that hold a row for each example."""
        return [leaf for leaf, own in zip(leaves(self.value), self.rows, strict=True) if own and _is_tensor(leaf)]

    def with_rows(self, given: Sequence[Tensor], n: int) -> Batch:
        """With other tensors for those of `per_example`, of n rows."""
        new, own = iter(given), iter(self.rows)
        value = map_leaves(lambda leaf: next(new) if next(own) and _is_tensor(leaf) else leaf, self.value)
        return dataclasses.replace(self, value=value, n=n)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def raw_of(x: Any) -> Any:
    """A batch in the form that the loader gives."""
    return x.value if isinstance(x, Batch) else x


def as_batch(x: Any) -> Batch:
    """A Batch as it is; of a raw batch, the leaves of n rows have one for each example."""
    if isinstance(x, Batch):
        return x
    n = batch_size(inputs_of(x))
    return Batch.of(x, n, [has_rows(leaf, n) for leaf in leaves(x)])


def inputs_of(batch: Any) -> Any:
    """What n is read from, without asking a model: a mapping without its labels, x of (x, y), all but the last of a
    longer tuple, or itself. Probes are hashed by it, so that a hash says nothing about a model."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_KEYS} or batch
    if isinstance(batch, tuple | list) and batch:
        return tuple(batch[:-1]) if len(batch) > 2 else batch[0]
    return batch


def leaves(batch: Any) -> list[Any]:
    """The leaves of nested mappings, tuples and lists, in order."""
    found: list[Any] = []
    map_leaves(lambda leaf: found.append(leaf), batch.value if isinstance(batch, Batch) else batch)
    return found


def map_leaves(fn: Callable[[Any], Any], batch: Any) -> Any:
    """`fn` of every leaf of nested mappings, tuples, lists and dataclasses, with the containers' types kept."""
    if isinstance(batch, Batch):
        return dataclasses.replace(batch, value=map_leaves(fn, batch.value))
    if isinstance(batch, Mapping):
        items = {key: map_leaves(fn, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return items
        new = copy.copy(batch)
        new.update(items)
        return new
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(fn, item) for item in batch))
    if isinstance(batch, tuple | list) and not (batch and all(isinstance(item, str) for item in batch)):
        return type(batch)(map_leaves(fn, item) for item in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_leaves(fn, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return fn(batch)


def batch_size(inputs: Any) -> int:
    """The number of examples: the first dimension of the first tensor among the leaves.

    Raises:
        ValueError: no tensor with at least one dimension is among them.
    """
    if isinstance(inputs, Batch):
        return inputs.n
    for leaf in leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    if (said := custom_batch_advice(inputs)) is not None:
        raise ValueError(said)
    got = "a tensor of no dimensions" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(f"a batch must hold a tensor [n, ...], got {got}; pass tensors, or collate them first")


def custom_batch_advice(inputs: Any) -> str | None:
    """What to do about an object that holds its tensors in its own way, such as a batch of graphs; None for others."""
    given = next((leaf for leaf in leaves(inputs) if hasattr(leaf, "to") and not isinstance(leaf, Tensor)), None)
    if given is None:
        return None
    targets = ", targets=lambda rows: batch.y[rows]" if isinstance(getattr(given, "y", None), Tensor) else ""
    return (
        f"a batch must hold a tensor [n, ...], got {type(given).__name__}, whose examples cannot be taken one by one: "
        "pass their numbers as probes, torch.arange(len(model(batch))), with "
        f"outputs=lambda model, rows: model(batch)[rows]{targets}, where batch is this {type(given).__name__}"
    )


def is_per_example(leaf: Any, n: int) -> bool:
    """Whether a leaf is a tensor of n rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == n


def has_rows(leaf: Any, n: int) -> bool:
    """Whether a leaf is a tensor of n rows, or n strings."""
    return is_per_example(leaf, n) or (isinstance(leaf, tuple | list) and len(leaf) == n)


def take(batch: Any, rows: slice | list[int]) -> Any:
    """The batch restricted to some rows: leaves with a row for each example are indexed, others are kept."""
    whole = as_batch(batch)
    own = iter(whole.rows)

    def pick(leaf: Any) -> Any:
        if not next(own):
            return leaf
        if isinstance(leaf, Tensor) or isinstance(rows, slice):
            return leaf[rows]
        return type(leaf)(leaf[i] for i in rows)

    part = map_leaves(pick, whole)
    n = len(range(whole.n)[rows]) if isinstance(rows, slice) else len(rows)
    return dataclasses.replace(part, n=n) if batch is whole else part.fresh()


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on `device`."""
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

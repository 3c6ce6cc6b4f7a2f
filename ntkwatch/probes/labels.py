"""Which class each example of a dataset is in, where that can be seen without loading the examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ntkwatch.model import LABEL_KEYS


def seen_labels(dataset: Any) -> tuple[Tensor, str] | None:
    """(class of each example [len(dataset)], where it was read), or None.

    Read from `.targets`, `.labels`, the last tensor of a TensorDataset, a label column of a table (Hugging Face), and
    from subsets and concatenations of those. Classes may be integers, booleans or strings; floats are none.
    """
    if isinstance(dataset, Subset):
        inner = seen_labels(dataset.dataset)
        if inner is None:
            return None
        return inner[0][torch.as_tensor(list(dataset.indices), dtype=torch.long, device="cpu")], inner[1]
    if isinstance(dataset, ConcatDataset):
        parts = [seen_labels(part) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return (torch.cat([labels for labels, _ in found]), found[0][1]) if found and len(found) == len(parts) else None
    for name, read in _candidates(dataset):
        labels = as_classes(read, len(dataset))
        if labels is not None:
            return labels, name
    return None


def _candidates(dataset: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in ("targets", "labels"):
        try:
            found.append((f"dataset.{name}", getattr(dataset, name, None)))
        except Exception:  # noqa: BLE001, S112, RUF100  a property of the user's, which may need what is not there yet
            continue
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        found.append(("the dataset's last tensor", dataset.tensors[-1]))
    columns = getattr(dataset, "column_names", None)
    for key in LABEL_KEYS if isinstance(columns, list) else ():
        if key in columns:  # type: ignore[operator]
            found.append((f"dataset[{key!r}]", dataset[key]))
    return found


def as_classes(values: Any, n: int) -> Tensor | None:
    """[n] class numbers 0 … of n integers, booleans or strings; None for anything else."""
    if values is None or isinstance(values, str | Mapping):
        return None
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (n,) or array.dtype.kind not in "biuUS":
        return None
    return torch.from_numpy(np.unique(array, return_inverse=True)[1].reshape(-1).astype(np.int64))


def label_of(item: Any) -> int | str | None:
    """The class of one example as a dataset gives it: under a label key, or last of a tuple; None if it shows none."""
    if isinstance(item, Mapping):
        value = next((item[key] for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list) and len(item) > 1:
        value = item[-1]
    else:
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        whole = (not value.is_floating_point()) if isinstance(value, Tensor) else value.dtype.kind in "biu"
        size = value.numel() if isinstance(value, Tensor) else value.size
        return int(value.item()) if whole and size == 1 else None
    return value if isinstance(value, int | str) else None


def balanced(classes: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """n positions in `classes` [m], as many of each class as there are to have, in a seeded order."""
    order = torch.randperm(len(classes), generator=generator, device="cpu")
    turn = torch.randperm(int(classes.max()) + 1, generator=generator, device="cpu")[classes[order]]
    by_class = torch.sort(turn, stable=True).indices
    sizes = torch.bincount(turn)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.empty_like(order)
    rank[by_class] = (
        torch.arange(len(order), device="cpu") - starts[turn[by_class]]
    )  # how many of its class came before
    first = torch.argsort(rank * len(sizes) + turn, stable=True)[:n]
    return [int(i) for i in order[first]]

"""Which class each example of a dataset is in, where that can be seen without loading the examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ntkwatch.model.batch import LABEL_KEYS


def dataset_labels(dataset: Any, leading: int | None = None) -> tuple[Tensor, str] | None:
    """(class of each example [len(dataset)], where it was read), or None.

    Read from `.targets`, `.labels`, the tensor of a TensorDataset after the `leading` ones that a model takes (None:
    the last), a label column of a table (Hugging Face), and from subsets and concatenations of those. Classes are what
    `class_ids` says.
    """
    if isinstance(dataset, Subset):
        inner = dataset_labels(dataset.dataset, leading)
        if inner is None:
            return None
        return inner[0][torch.as_tensor(list(dataset.indices), dtype=torch.long, device="cpu")], inner[1]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_labels(part, leading) for part in dataset.datasets]
        found = [part for part in parts if part is not None]
        return (torch.cat([labels for labels, _ in found]), found[0][1]) if found and len(found) == len(parts) else None
    for name, read in _candidates(dataset, leading):
        labels = class_ids(read, len(dataset))
        if labels is not None:
            return labels, name
    return None


def _candidates(dataset: Any, leading: int | None) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in ("targets", "labels"):
        try:
            found.append((f"dataset.{name}", getattr(dataset, name, None)))
        except Exception:  # noqa: BLE001, S112, RUF100  a property of the user's, which may need what is not there yet
            continue
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        place, last = _label_index(dataset.tensors, leading), len(dataset.tensors) - 1
        which = "last tensor" if place == last else f"tensor {place + 1}"
        found.append((f"the dataset's {which}", dataset.tensors[place]))
    columns = getattr(dataset, "column_names", None)
    for key in LABEL_KEYS if isinstance(columns, list) else ():
        if key in columns:  # type: ignore[operator]
            found.append((f"dataset[{key!r}]", dataset[key]))
    return found


def class_ids(values: Any, n: int) -> Tensor | None:
    """[n] class numbers 0 … of n integers, booleans, strings, or floats of two values; None for anything else."""
    if values is None or isinstance(values, str | Mapping):
        return None
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (n,) or array.dtype.kind not in "biuUSf":
        return None
    values, number = np.unique(array, return_inverse=True)
    if array.dtype.kind == "f" and (len(values) != 2 or not np.isfinite(values).all()):
        return None
    return torch.from_numpy(number.reshape(-1).astype(np.int64))


def label_of(item: Any, leading: int | None = None) -> int | float | str | None:
    """The class of one example as a dataset gives it: under a label key, or in a tuple after the `leading` inputs.

    leading: None takes the last. None where it shows none; a string is one where nothing else is left, as a path is.
    """
    if isinstance(item, Mapping):
        value = next((item[key] for key in LABEL_KEYS if key in item), None)
    elif isinstance(item, tuple | list):
        rest = item[_label_index(item, leading) :] if len(item) > 1 else ()
        value = next((each for each in rest if not isinstance(each, str)), next(iter(rest), None))
    else:
        return None
    if isinstance(value, Tensor | np.ndarray | np.generic):
        size = value.numel() if isinstance(value, Tensor) else value.size
        value = value.item() if size == 1 else None
    return value if isinstance(value, int | float | str) else None


def _label_index(item: Any, leading: int | None) -> int:
    """Where the label is in a tuple; the last where a collate function must add what the model takes besides."""
    nested = isinstance(item[0], tuple | list) and len(item[0]) == leading  # ((x1, x2), y)
    place = 1 if nested else leading
    return len(item) - 1 if place is None or place >= len(item) else place


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

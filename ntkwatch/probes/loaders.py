"""Loaders as a Trainer holds them: one, or several in lists, dicts and CombinedLoaders; and their batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset


def first_loader(loader: Any) -> tuple[Any, str]:
    """The first of several loaders, and a clause that says so."""
    several = 0
    while (parts := _parts(loader := _unwrapped(loader))) is not None:
        if not parts:
            return None, ""
        several = max(several, len(parts))
        loader = next(iter(parts.values()))
    return loader, f", from the first of {several} loaders" if several > 1 else ""


def is_streaming(loader: Any) -> bool:
    """Whether the loader's examples can only be had in turn: an IterableDataset, or no dataset that can be indexed."""
    dataset = getattr(first_loader(loader)[0], "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return True
    try:
        len(dataset)
    except (TypeError, NotImplementedError):
        return True
    return False


def batches_of(loader: Any, batch: Any) -> list[Any]:
    """The batch of each single loader in a batch of several, in their order; None for one that has run out."""
    loaders, batches = _parts(_unwrapped(loader)), _parts(batch)
    if loaders is None or batches is None or not loaders.keys() <= batches.keys():
        return [batch]
    return [single for key, part in loaders.items() for single in batches_of(part, batches[key])]


def _unwrapped(loader: Any) -> Any:
    """What Lightning's CombinedLoader combines; anything else as it is."""
    return loader if hasattr(loader, "dataset") else getattr(loader, "iterables", loader)


def _parts(several: Any) -> dict[Any, Any] | None:
    """What a mapping, list or tuple holds, by key or place; None for anything else."""
    if isinstance(several, Mapping):
        return dict(several)
    return dict(enumerate(several)) if isinstance(several, tuple | list) else None

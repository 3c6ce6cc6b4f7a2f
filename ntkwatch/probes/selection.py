"""Choose probes from a loader: its dataset is indexed, it is never iterated, and nothing of the run is drawn from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_convert

from ntkwatch.guard import preserve_objects
from ntkwatch.model import batch_size, inputs_of
from ntkwatch.probes.labels import balanced, class_ids, dataset_labels, label_of
from ntkwatch.probes.loaders import first_loader, is_streaming
from ntkwatch.probes.probeset import ProbeSet, Targets
from ntkwatch.probes.stream import RowCollector

MAX_CANDIDATES = 1024  # examples that are loaded, at most, to see their classes
_MIN_FLOAT_VALUES = 3  # different floats that are values, no classes
_MIN_SAMPLES_PER_PROBE = 4  # … and fewer, once 4n have been seen and no class that was seen is short of its share


def choose_probes(
    loader: Any, n: int = 64, seed: int = 0, source: str = "val", targets: Targets = None, leading: int | None = None
) -> ProbeSet:
    """n examples of the loader's dataset, class-balanced where classes can be seen, collated as the loader would.

    The same seed gives the same examples with the same random augmentation, whatever else the process has drawn.

    Args:
        loader: a DataLoader, or a list, tuple, dict or CombinedLoader of them, of which the first is taken.
        source: "val" or "train", kept in the ProbeSet and said in errors.
        targets: None takes those of the batch; or a callable of the batch.
        leading: how many leading items of a tuple the model takes, the next of which is the label; None: all but one.

    Raises:
        ValueError: an empty or streaming dataset, or targets that cannot be matched with the probes.
    """
    if isinstance(targets, Tensor):
        raise ValueError(
            "targets= is a tensor, but which examples become probes is only known once they are chosen; "
            "pass the inputs as probes= as well, or a callable, as targets=lambda batch: batch[1]"
        )
    if is_streaming(loader):
        raise ValueError(f"the {source} loader only streams: use from_stream on its first batches")
    loader, which = first_loader(loader)
    dataset = loader.dataset
    held = (dataset, getattr(loader, "collate_fn", None))
    with preserve_objects(*held), torch.inference_mode(False), torch.no_grad():
        pool = _pool(loader, len(dataset))
        if len(pool) == 0:
            raise ValueError(f"the {source} dataset is empty: pass probes= a batch, or a loader with examples")
        if _gives_batches(loader):
            return _from_batches(loader, pool, n, seed, source, targets, which)
        loaded: dict[int, Any] = {}
        indices, how = _indices(dataset, pool, n, seed, leading, loaded)
        items = [loaded[i] if i in loaded else _load_example(dataset, i, seed) for i in indices]
        if not _labels_agree(
            dataset, indices, items, leading
        ):  # a wrapper that reorders shows the labels of what it wraps
            indices, how = _indices(dataset, pool, n, seed, leading, trusted=False)
            items = [_load_example(dataset, i, seed) for i in indices]
        _seed_process(seed, len(dataset))
        batch = (getattr(loader, "collate_fn", None) or default_collate)(items)
        kept = batch_size(inputs_of(batch))
        if kept != len(indices):
            how += f", of which collate_fn made {kept} rows"
        rows = indices if kept == len(indices) else None
        return ProbeSet.from_batch(batch, targets, source, f"{how}{which}, seed {seed}", rows)


# ── loaders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _pool(loader: Any, size: int) -> Tensor:
    """[m] the indices that the loader may draw: a SubsetRandomSampler's, or all."""
    for start in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        for _ in range(4):  # Lightning wraps samplers
            indices = _as_indices(getattr(start, "indices", None), size)
            if indices is not None:
                return indices
            start = next((inner for path in _WRAPPED if (inner := _follow(start, path)) is not None), None)
    return torch.arange(size, device="cpu")


def _as_indices(values: Any, size: int) -> Tensor | None:
    if isinstance(values, list) and not values:
        return torch.empty(0, dtype=torch.long, device="cpu")
    try:
        found = torch.as_tensor(values, device="cpu").reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        return None
    if found.is_floating_point() or (len(found) and not 0 <= int(found.min()) <= int(found.max()) < size):
        return None
    return found.long()


_WRAPPED = (("sampler",), ("_sampler",), ("dataset", "_sampler"))


def _follow(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = getattr(value, name, None)
    return value


def _gives_batches(loader: Any) -> bool:
    """batch_size=None: the dataset itself returns batches."""
    return getattr(loader, "batch_size", 1) is None and getattr(loader, "batch_sampler", None) is None


def _from_batches(loader: Any, pool: Tensor, n: int, seed: int, source: str, targets: Targets, which: str) -> ProbeSet:
    convert = getattr(loader, "collate_fn", None) or default_convert
    order = pool[torch.randperm(len(pool), generator=_generator(seed), device="cpu")]
    gathered = RowCollector(n)
    for i in order.tolist():
        gathered.add(convert(_load_example(loader.dataset, i, seed)))
        if gathered.complete:
            break
    read = f"{gathered.batches} of the {len(pool)} batches that the dataset gives"
    return gathered.probes(targets, source, f"{len(gathered)} rows of {read}{which}, seed {seed}")


# ── which examples ───────────────────────────────────────────────────────────────────────────────────────────────


def _indices(
    dataset: Any,
    pool: Tensor,
    n: int,
    seed: int,
    leading: int | None,
    loaded: dict[int, Any] | None = None,
    trusted: bool = True,
) -> tuple[list[int], str]:
    """Which examples, and how they were chosen; the few that showed no classes are kept in `loaded`."""
    generator = _generator(seed)
    if len(pool) <= n:
        return pool.tolist(), f"all {len(pool)} examples{_shortfall(len(pool), n)}"
    seen = dataset_labels(dataset, leading) if trusted else None
    if seen is not None:
        classes, where = class_ids(seen[0][pool], len(pool)), seen[1]
        assert classes is not None
        chosen = pool[balanced(classes, n, generator)].tolist()
        return chosen, _describe_balance(n, len(pool), int(classes.max()) + 1, where)
    candidates = pool[torch.randperm(len(pool), generator=generator, device="cpu")[:MAX_CANDIDATES]].tolist()
    classes = _candidate_classes(dataset, candidates, n, seed, leading, {} if loaded is None else loaded)
    if classes is None:
        return candidates[:n], f"{n} of {len(pool)} examples, uniformly: no class labels are seen"
    chosen = [candidates[i] for i in balanced(classes, n, generator)]
    return chosen, _describe_balance(n, len(pool), int(classes.max()) + 1, f"the labels of {len(classes)} candidates")


def _labels_agree(dataset: Any, indices: list[int], items: list[Any], leading: int | None) -> bool:
    """Whether the labels that were seen from outside decide those of the examples, as far as these show theirs."""
    seen = dataset_labels(dataset, leading)
    inside = [label_of(item, leading) for item in items]
    if seen is None or any(label is None or isinstance(label, float) for label in inside):
        return True
    outside = seen[0][indices].tolist()
    return len(set(zip(outside, inside, strict=True))) == len(set(outside))


def _describe_balance(n: int, size: int, classes: int, where: str) -> str:
    return f"{n} of {size} examples, balanced over {classes} class{'es' * (classes != 1)} from {where}"


def _shortfall(got: int, n: int) -> str:
    return f" ({n} were asked for)" if got < n else ""


def _candidate_classes(
    dataset: Any, candidates: list[int], n: int, seed: int, leading: int | None, loaded: dict[int, Any]
) -> Tensor | None:
    """Classes of the first candidates, until each class seen has its share; None if an example shows none."""
    labels: list[int | float | str] = []
    counts: dict[int | float | str, int] = {}
    for i in candidates:
        item = _load_example(dataset, i, seed)
        if len(loaded) < _MIN_FLOAT_VALUES:
            loaded[i] = item
        label = label_of(item, leading)
        if label is None or (isinstance(label, float) and label not in counts and len(counts) == _MIN_FLOAT_VALUES - 1):
            return None
        labels.append(label)
        counts[label] = counts.get(label, 0) + 1
        if len(labels) >= _MIN_SAMPLES_PER_PROBE * n and min(counts.values()) * len(counts) >= n:
            break
    return class_ids(labels, len(labels))


# ── randomness of one's own ──────────────────────────────────────────────────────────────────────────────────────


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def _load_example(dataset: Any, index: int, seed: int) -> Any:
    """One example; its random augmentation depends on the seed and the index alone."""
    _seed_process(seed, index)
    return dataset[index]


def _seed_process(seed: int, index: int) -> None:
    number = (seed * 1_000_003 + index) % 2**32
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  what a dataset's own augmentation draws from
    torch.default_generator.manual_seed(number)  # not torch.manual_seed: that also seeds a GPU that has not started
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)

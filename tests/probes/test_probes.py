"""Probes: balanced, frozen, named by their content, and chosen without drawing from the run."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import struct
import subprocess
import sys
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)  # fmt: skip

from ntkwatch.model import inputs_of
from ntkwatch.probes import (
    ProbeSet,
    as_probe_set,
    choose_probes,
    encode_targets,
    from_stream,
    is_streaming,
    parse_probes,
)
from ntkwatch.probes.probeset import content_hash

N, CLASSES = 500, 10
X = torch.arange(N * 6, dtype=torch.float32).reshape(N, 6) / 100
Y = torch.tensor([(i * i) % 7 % CLASSES for i in range(N)])
GLOBAL_RNG = np.random.default_rng(3)


class Plain(Dataset[Any]):
    """Examples of any form, with no list of labels on the outside."""

    def __init__(self, form: Callable[[int], Any], n: int = N) -> None:
        self.form, self.n = form, n
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.n:
            raise IndexError(index)
        READS.append(index)
        return self.form(index)


READS: list[int] = []


def with_attribute(name: str, values: Any) -> Plain:
    dataset = Plain(lambda i: (X[i], int(Y[i])))
    setattr(dataset, name, values)
    return dataset


class Table:
    """What a Hugging Face dataset shows: column names, and columns by name."""

    def __init__(self) -> None:
        self.column_names = ["x", "label"]

    def __len__(self) -> int:
        return N

    def __getitem__(self, key: Any) -> Any:
        return Y.tolist() if key == "label" else {"x": X[key], "label": int(Y[key])}


# ── class balance ──────────────────────────────────────────────────────────────────────────────────────────────────

BALANCED: dict[str, tuple[Callable[[], Any], str]] = {
    "TensorDataset": (lambda: TensorDataset(X, Y), "the dataset's last tensor"),
    "targets, list": (lambda: with_attribute("targets", Y.tolist()), "dataset.targets"),
    "targets, tensor": (lambda: with_attribute("targets", Y), "dataset.targets"),
    "targets, array": (lambda: with_attribute("targets", Y.numpy()), "dataset.targets"),
    "targets, column": (lambda: with_attribute("targets", Y[:, None]), "dataset.targets"),
    "labels, strings": (lambda: with_attribute("labels", [f"class {y}" for y in Y]), "dataset.labels"),
    "a table": (Table, "dataset['label']"),
    "Subset": (lambda: Subset(TensorDataset(X, Y), list(range(100, 400))), "the dataset's last tensor"),
    "Subset of a Subset": (lambda: Subset(Subset(with_attribute("targets", Y), range(400)), range(50, 350)), "targets"),
    "ConcatDataset": (lambda: ConcatDataset([TensorDataset(X, Y), with_attribute("targets", Y)]), "last tensor"),
    "random_split": (lambda: random_split(TensorDataset(X, Y), [300, 200])[0], "the dataset's last tensor"),
    "a plain list": (lambda: [(X[i], int(Y[i])) for i in range(N)], "candidates"),
    "seen in tuples": (lambda: Plain(lambda i: (X[i], int(Y[i]))), "candidates"),
    "seen in dicts": (lambda: Plain(lambda i: {"x": X[i], "label": Y[i]}), "candidates"),
    "seen as numpy": (lambda: Plain(lambda i: (X[i].numpy(), np.int64(Y[i]))), "candidates"),
    "seen as bool": (lambda: Plain(lambda i: (X[i], bool(Y[i] > 1))), "candidates"),
    "seen as longer tuples": (lambda: Plain(lambda i: (X[i], X[i] * 2, Y[i : i + 1])), "candidates"),
}


@pytest.mark.parametrize("name", BALANCED)
def test_classes_are_balanced(name: str) -> None:
    """No class has fewer probes than another, by more than one, unless all of its examples are probes."""
    make, where = BALANCED[name]
    probes = choose_probes(DataLoader(make(), batch_size=32, shuffle=True), 40)
    assert where in probes.how, f"{name}: {probes.how}"
    assert probes.targets is not None
    counts = torch.unique(probes.targets, return_counts=True)[1]
    assert len(probes) == 40, name
    assert int(counts.max() - counts.min()) <= 1, f"{name}: {counts.tolist()}"
    assert len(set(probes.indices or ())) == 40, f"{name}: an example twice"


def test_a_rare_class_is_taken_whole() -> None:
    y = torch.zeros(1000, dtype=torch.long)
    y[[3, 500]] = 1
    y[700:] = 2
    probes = choose_probes(DataLoader(TensorDataset(torch.randn(1000, 3), y)), 64)
    assert torch.bincount(probes.targets).tolist() == [31, 2, 31]
    assert {3, 500} <= set(probes.indices)


def test_more_classes_than_probes_draws_among_the_classes() -> None:
    y = torch.arange(1000) // 2
    probes = choose_probes(DataLoader(TensorDataset(torch.randn(1000, 3), y)), 64)
    assert len(torch.unique(probes.targets)) == 64
    assert int(probes.targets.max()) > 300, "the first classes were taken instead of any"


def test_balance_follows_the_seed() -> None:
    loader = DataLoader(TensorDataset(X, Y))
    assert choose_probes(loader, 40, seed=1).indices != choose_probes(loader, 40, seed=2).indices
    assert choose_probes(loader, 40, seed=1).indices == choose_probes(loader, 40, seed=1).indices


UNIFORM: dict[str, Callable[[], Any]] = {
    "regression tensors": lambda: TensorDataset(X, X[:, 0]),
    "several targets": lambda: TensorDataset(X, X[:, :3]),
    "inputs alone": lambda: TensorDataset(X),
    "a tensor an example": lambda: Plain(lambda i: X[i]),
    "token sequences": lambda: Plain(lambda i: {"input_ids": torch.arange(5) + i, "labels": torch.arange(5)}),
    "labels of another length": lambda: with_float_labels("labels", ["cat", "dog"]),
    "float targets": lambda: with_float_labels("targets", X[:, 0].tolist()),
}


def with_float_labels(name: str, values: Any) -> Plain:
    dataset = Plain(lambda i: (X[i], X[i, 0]))
    setattr(dataset, name, values)
    return dataset


@pytest.mark.parametrize("name", UNIFORM)
def test_without_classes_the_choice_is_uniform_and_says_so(name: str) -> None:
    READS.clear()
    probes = choose_probes(DataLoader(UNIFORM[name](), batch_size=8), 40)
    assert "uniformly: no class labels are seen" in probes.how, f"{name}: {probes.how}"
    assert len(probes) == 40
    assert len(READS) <= 41, f"{name}: {len(READS)} examples were loaded to choose 40"


def test_labels_that_belong_to_other_examples_are_not_believed() -> None:
    """A wrapper that reorders and passes attributes on shows the labels of what it wraps."""

    class Reordered(Plain):
        targets = (torch.arange(N) % 5).tolist()

    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    probes = choose_probes(DataLoader(Reordered(lambda i: (X[order[i]], int(order[i] % 5)))), 40)
    assert "candidates" in probes.how, probes.how
    assert torch.bincount(probes.targets).tolist() == [8] * 5
    coarse = with_attribute("targets", list(range(N)))  # fine classes outside, coarse ones inside: no contradiction
    assert "dataset.targets" in choose_probes(DataLoader(coarse), 40).how


def test_a_collate_function_that_drops_examples() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.utils.data.default_collate([item for item in items if item[1] > 0])

    probes = choose_probes(DataLoader(TensorDataset(X, Y), collate_fn=collate), 40)
    assert 0 < len(probes) < 40
    assert f"of which collate_fn made {len(probes)} rows" in probes.how
    assert probes.indices is None, "rows and indices no longer match"


def test_a_target_property_that_raises_is_passed_over() -> None:
    class Shy(Plain):
        @property
        def targets(self) -> Any:
            raise RuntimeError("download me first")

    assert "candidates" in choose_probes(DataLoader(Shy(lambda i: (X[i], int(Y[i])))), 40).how


def test_no_more_candidates_than_needed_are_loaded() -> None:
    READS.clear()
    choose_probes(DataLoader(Plain(lambda i: (X[i % N], i % 4), n=100_000)), 64)
    assert len(READS) <= 4 * 64 + 8 + 64, f"{len(READS)} examples loaded for 64 probes of 4 classes"
    READS.clear()
    choose_probes(DataLoader(Plain(lambda i: (X[i % N], i), n=100_000)), 64)
    assert len(READS) <= 1024 + 64, f"{len(READS)} examples loaded where each is its own class"


# ── nothing of the run is drawn from ───────────────────────────────────────────────────────────────────────────────


class Augmented(Dataset[Any]):
    """Every habit at once: global randomness, own generators, a cache, a counter, a file opened at first use."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.transform = Jitter()
        self.cache: dict[int, Any] = {}
        self.calls, self.file = 0, None
        self.pipeline = [self.transform, Jitter()]

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        self.file = self.file or object()
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        self.cache[index] = noise
        own = torch.rand((), generator=self.generator) + GLOBAL_RNG.random()
        x = X[index] + noise + 0 * own
        for transform in self.pipeline:
            x = transform(x)
        return x, int(Y[index])


class Jitter:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(4)
        self.python = random.Random(4)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0 * (self.rng.random() + self.python.random())


def noisy_collate(items: list[Any]) -> Any:
    x, y = torch.utils.data.default_collate(items)
    return x + torch.rand(()) + random.random(), y


def state_of(dataset: Augmented) -> list[Any]:
    return [
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()),  # noqa: NPY002
        dataset.generator.get_state().tolist(), str(dataset.transform.rng.bit_generator.state),
        dataset.transform.python.getstate(), str(GLOBAL_RNG.bit_generator.state), dict(dataset.cache), dataset.calls,
        dataset.file, len(torch.cuda._queued_calls),
    ]  # fmt: skip


def test_choosing_draws_nothing_and_leaves_the_dataset_alone() -> None:
    dataset = Augmented()
    own = torch.Generator().manual_seed(2)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=noisy_collate, generator=own)
    before = [*state_of(dataset), own.get_state().tolist()]
    choose_probes(loader, 32)
    assert [*state_of(dataset), own.get_state().tolist()] == before


def test_the_snapshot_can_see_an_example_being_loaded() -> None:
    dataset = Augmented()
    before = state_of(dataset)
    dataset[0]
    after = state_of(dataset)
    same = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a == b]
    assert same == [10], f"parts {same} of the snapshot did not see it (10 are CUDA's seeds, not used here)"


def test_a_failing_dataset_leaves_the_random_state_too() -> None:
    def form(i: int) -> Any:
        torch.rand(3), random.random()
        raise OSError("file not found")

    torch_state, python_state = torch.get_rng_state(), random.getstate()
    with pytest.raises(OSError, match="file not found"):
        choose_probes(DataLoader(Plain(form)), 8)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize("classes", [3, None], ids=["by class", "uniformly"])
def test_the_choice_is_the_same_whatever_was_drawn_before(classes: int | None) -> None:
    y = torch.arange(60) % classes if classes else torch.linspace(0, 1, 60)
    loader = DataLoader(TensorDataset(torch.randn(60, 4), y))
    chosen = []
    for seed in range(3):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        chosen.append(choose_probes(loader, 12).indices)
    assert chosen[0] == chosen[1] == chosen[2]


def test_augmentation_is_the_same_whatever_was_drawn_before() -> None:
    def probes() -> ProbeSet:
        return choose_probes(DataLoader(Augmented(), collate_fn=noisy_collate), 32, seed=5)

    first = probes()
    torch.rand(7), random.random(), np.random.rand(5)  # noqa: NPY002
    second = probes()
    assert first.hash == second.hash
    assert choose_probes(DataLoader(Augmented(), collate_fn=noisy_collate), 32, seed=6).hash != first.hash


def test_the_loader_is_never_iterated() -> None:
    class Watched(DataLoader):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            raise AssertionError("the loader was iterated")

    class Sampler(RandomSampler):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("the sampler was iterated")

    dataset = TensorDataset(X, Y)
    assert len(choose_probes(Watched(dataset, sampler=Sampler(dataset)), 16)) == 16


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference mode", "no grad"])
def test_probes_chosen_in_any_mode_are_ordinary_tensors(mode: Any) -> None:
    with mode():
        probes = choose_probes(DataLoader(TensorDataset(X, Y)), 8)
        moved = as_probe_set((X, Y))
    for held in (probes, moved):
        assert not held.batch[0].is_inference()
        assert not held.batch[0].requires_grad


def test_another_default_device_or_type_changes_nothing() -> None:
    expected = choose_probes(DataLoader(TensorDataset(X, Y)), 16)
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        assert choose_probes(DataLoader(TensorDataset(X, Y), generator=torch.Generator()), 16).hash == expected.hash
        assert encode_targets(expected.targets, 10)[0].device.type == "cpu"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# ── loaders of every kind ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_batch_is_as_the_loader_gives_it() -> None:
    def collate(items: list[Any]) -> dict[str, Any]:
        longest = max(len(item["ids"]) for item in items)
        ids = torch.stack([torch.nn.functional.pad(item["ids"], (0, longest - len(item["ids"]))) for item in items])
        return {"input_ids": ids, "attention_mask": ids != 0, "labels": torch.tensor([item["y"] for item in items])}

    dataset = Plain(lambda i: {"ids": torch.arange(1, 3 + i % 5), "y": int(Y[i])})
    probes = choose_probes(DataLoader(dataset, batch_size=4, collate_fn=collate), 20)
    assert set(probes.batch) == {"input_ids", "attention_mask", "labels"}
    assert set(probes.inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(probes.targets, Y[list(probes.indices)])
    assert torch.equal(probes.targets, probes.batch["labels"])


def test_custom_batch_samplers_and_batch_sizes_do_not_matter() -> None:
    dataset = TensorDataset(X, Y)
    loaders = {
        "one": DataLoader(dataset, batch_size=1),
        "large": DataLoader(dataset, batch_size=400, shuffle=True, drop_last=True),
        "batch sampler": DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 7, False)),
        "weighted": DataLoader(dataset, sampler=WeightedRandomSampler([1.0] * N, 5)),
        "workers": DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True),
    }
    hashes = {name: choose_probes(loader, 16).hash for name, loader in loaders.items()}
    assert len(set(hashes.values())) == 1, hashes


def test_a_split_by_sampler_is_kept() -> None:
    """Train and validation are often one dataset with two SubsetRandomSamplers."""
    dataset, held_out = TensorDataset(X, Y), list(range(300, 450))
    samplers = {
        "sampler": {"sampler": SubsetRandomSampler(held_out)},
        "batch sampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(held_out), 8, False)},
    }
    for name, arguments in samplers.items():
        probes = choose_probes(DataLoader(dataset, **arguments), 40)
        assert set(probes.indices) <= set(held_out), f"{name}: probes from outside the split"
        assert "of 150 examples" in probes.how, probes.how


def test_a_split_by_sampler_is_kept_under_lightnings_wrappers() -> None:
    wrappers = pytest.importorskip("lightning_fabric.utilities.distributed")
    held_out = list(range(300, 450))
    wrapped = wrappers.DistributedSamplerWrapper(SubsetRandomSampler(held_out), num_replicas=2, rank=0)
    probes = choose_probes(DataLoader(TensorDataset(X, Y), sampler=wrapped), 40)
    assert set(probes.indices) <= set(held_out)


def test_a_sampler_with_indices_of_another_kind_is_ignored() -> None:
    class Buckets(SequentialSampler):
        indices = (("a", 3), ("b", 4))

    dataset = TensorDataset(X, Y)
    assert len(choose_probes(DataLoader(dataset, sampler=Buckets(dataset)), 40)) == 40


LOADERS: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"digits": a, "letters": b},
    "nested": lambda a, b: {"both": [a, b]},
}


@pytest.mark.parametrize("name", [*LOADERS, "CombinedLoader"])
def test_of_several_loaders_the_first_is_taken_and_said(name: str) -> None:
    first, second = DataLoader(TensorDataset(X, Y)), DataLoader(TensorDataset(X + 1e4, Y))
    if name == "CombinedLoader":
        combined = pytest.importorskip("pytorch_lightning.utilities.combined_loader")
        loaders = combined.CombinedLoader({"a": first, "b": second}, "max_size_cycle")
    else:
        loaders = LOADERS[name](first, second)
    probes = choose_probes(loaders, 16)
    assert "the first of 2 loaders" in probes.how, probes.how
    assert probes.hash == choose_probes(first, 16).hash
    assert "loaders" not in choose_probes([first], 16).how


def test_small_and_empty_datasets() -> None:
    probes = choose_probes(DataLoader(TensorDataset(X[:5], Y[:5])), 64)
    assert len(probes) == 5
    assert probes.indices == (0, 1, 2, 3, 4)
    assert "all 5 examples (64 were asked for)" in probes.how
    assert "asked" not in choose_probes(DataLoader(TensorDataset(X[:64], Y[:64])), 64).how
    with pytest.raises(ValueError, match="the val dataset is empty: pass probes="):
        choose_probes(DataLoader(TensorDataset(X[:0], Y[:0])), 64)
    with pytest.raises(ValueError, match="the train dataset is empty"):
        choose_probes(DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler([])), 64, source="train")


def test_a_dataset_that_gives_batches() -> None:
    """batch_size=None: each item is a batch already."""
    batches = Plain(lambda i: (X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]), n=60)
    probes = choose_probes(DataLoader(batches, batch_size=None), 20)
    assert len(probes) == 20
    assert "of 3 of the 60 batches" in probes.how
    assert torch.equal(probes.targets, Y[(probes.batch[0][:, 0] * 100 / 6).round().long()]), "targets match inputs"


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ((X[i], Y[i]) for i in range(N))


class NoLength:
    def __getitem__(self, index: int) -> Any:
        return X[index]


@pytest.mark.parametrize(
    ("loader", "streams"),
    [
        (DataLoader(Stream(), batch_size=4), True),
        ([DataLoader(Stream())], True),
        (DataLoader(TensorDataset(X, Y)), False),
        (DataLoader(Table(), collate_fn=lambda items: items), False),
        ([(X, Y), (X, Y)], True),
        ((batch for batch in ()), True),
        (DataLoader(NoLength(), sampler=[1, 2]), True),
        ([], True),
        (None, True),
    ],
    ids=[
        "iterable",
        "list of iterable",
        "map-style",
        "table",
        "batches",
        "generator",
        "no length",
        "no loader",
        "None",
    ],
)
def test_is_streaming(loader: Any, streams: bool) -> None:
    assert is_streaming(loader) is streams
    if streams:
        with pytest.raises(ValueError, match="only streams"):
            choose_probes(loader, 4)


def test_probes_from_a_stream() -> None:
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 80, 8)]
    probes = from_stream(batches, 20, source="train")
    assert torch.equal(probes.batch[0], X[:20])
    assert torch.equal(probes.targets, Y[:20])
    assert probes.how == "the first 20 rows of the train stream"
    assert probes.indices is None
    short = from_stream(batches[:1], 20)
    assert len(short) == 8
    assert "(20 were asked for)" in short.how
    with pytest.raises(ValueError, match="gave no batch"):
        from_stream([], 20)


def test_a_stream_of_dicts_and_of_ragged_batches() -> None:
    dicts = [{"ids": torch.full((4, 3), i), "text": [f"{i}"] * 4, "labels": torch.arange(4)} for i in range(4)]
    probes = from_stream(dicts, 10)
    assert probes.batch["ids"].shape == (10, 3)
    assert probes.batch["text"] == ["0"] * 4 + ["1"] * 4 + ["2"] * 2
    assert probes.targets.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    ragged = [torch.ones(4, 3), torch.ones(4, 5)]
    assert from_stream(ragged, 8).batch.shape == (4, 3), "batches padded to other lengths are not joined"


# ── targets of a batch ─────────────────────────────────────────────────────────────────────────────────────────────

Pair = namedtuple("Pair", ["image", "kind"])


@dataclasses.dataclass
class Example:
    image: Tensor
    mask: Tensor


BATCHES: dict[str, tuple[Any, Any, int]] = {
    "tensor": (X[:8], None, 8),
    "pair": ((X[:8], Y[:8]), Y[:8], 8),
    "list": ([X[:8], Y[:8]], Y[:8], 8),
    "triple": ((X[:8], X[:8], Y[:8]), Y[:8], 8),
    "single in a tuple": ((X[:8],), None, 8),
    "namedtuple": (Pair(X[:8], Y[:8]), Y[:8], 8),
    "dict": ({"x": X[:8], "label": Y[:8]}, Y[:8], 8),
    "dict without labels": ({"x": X[:8]}, None, 8),
    "BatchEncoding (a UserDict)": (UserDict({"input_ids": Y[:8, None], "labels": Y[:8]}), Y[:8], 8),
    "dataclass": (Example(X[:8], X[:8] > 0), None, 8),
    "numpy": ((X[:8].numpy(), Y[:8].numpy()), Y[:8], 8),
    "targets as a list": ((X[:8], Y[:8].tolist()), Y[:8], 8),
    "a last item that is no target": ((X[:8], torch.tensor(3.0)), None, 8),
    "float targets": ((X[:8], X[:8, 0]), X[:8, 0], 8),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_every_kind(name: str) -> None:
    batch, targets, n = BATCHES[name]
    probes = ProbeSet.from_batch(batch)
    assert len(probes) == n
    assert type(probes.batch) is type(batch), f"{name}: the kind of the batch changed"
    assert (probes.targets is None) == (targets is None), name
    if targets is not None:
        assert torch.equal(probes.targets, torch.as_tensor(targets)), name
    assert probes.hash == content_hash(inputs_of(batch)), f"{name}: the hash is of the inputs as given"
    assert (probes.targets_hash is None) == (targets is None)


def test_probes_are_frozen() -> None:
    x, y = X[:8].clone().requires_grad_(), Y[:8].clone()
    probes = as_probe_set((x, y))
    with torch.no_grad():
        x.zero_(), y.zero_()
    assert torch.equal(probes.batch[0], X[:8])
    assert torch.equal(probes.targets, Y[:8])
    with pytest.raises(dataclasses.FrozenInstanceError):
        probes.hash = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (lambda batch: batch[0][:, 0] > 1, X[:8, 0] > 1),
        (lambda batch: batch[1].numpy(), Y[:8]),
        (lambda batch: batch[1].tolist(), Y[:8]),
        (lambda batch: None, Y[:8]),
        (Y[:8] + 1, Y[:8] + 1),
    ],
    ids=["callable", "numpy", "list", "callable that gives None", "tensor"],
)
def test_targets_of_the_user(targets: Any, expected: Tensor) -> None:
    assert torch.equal(as_probe_set((X[:8], Y[:8]), targets).targets, expected)


def test_targets_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match=r"targets= gives \[5\] for 8 probes"):
        as_probe_set(X[:8], Y[:5])
    with pytest.raises(ValueError, match=r"targets= gives \[\] for 8 probes"):
        as_probe_set(X[:8], lambda batch: 3)
    with pytest.raises(ValueError, match="targets= gives str, not a tensor"):
        as_probe_set(X[:8], lambda batch: "cats")
    with pytest.raises(ValueError, match="targets= is a tensor, but which examples become probes"):
        choose_probes(DataLoader(TensorDataset(X, Y)), 8, targets=Y[:8])


def test_a_probe_set_is_taken_as_it_is() -> None:
    probes = choose_probes(DataLoader(TensorDataset(X, Y)), 8)
    assert as_probe_set(probes) is probes
    other = as_probe_set(probes, lambda batch: batch[0].sum(1))
    assert (other.hash, other.how, other.indices) == (probes.hash, probes.how, probes.indices)
    assert other.targets_hash != probes.targets_hash


# ── the hash ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_is_the_same_everywhere() -> None:
    """Known answers: another process, machine or version of Python must give these very digits."""
    batch = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.tensor([1, 2]), "c": ["x", None, 1.5]}
    expected = content_hash(batch)
    by_hand = hashlib.sha256(b"torch.int64 (2,)\n" + struct.pack("<2q", 1, 2))
    by_hand.update(b"torch.float32 (2, 3)\n" + struct.pack("<6f", *range(6)))
    by_hand.update(b"str 3\n'x'" + b"NoneType 4\nNone" + b"float 3\n1.5")
    assert expected == by_hand.hexdigest() == "a399c5c86cf5b77e8535871fe13d01d73dc2474bbab8f1a13983481de25ba4ad"
    code = (
        "import torch; from ntkwatch.probes.probeset import content_hash;"
        "print(content_hash({'c': ['x', None, 1.5], 'a': torch.tensor([1, 2]),"
        "'b': torch.arange(6, dtype=torch.float32).reshape(2, 3)}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == expected, "the order of keys or the process changed the hash"


HASHED: dict[str, Any] = {
    "float": torch.ones(2, 3), "double": torch.ones(2, 3).double(), "half": torch.ones(2, 3).half(),
    "bfloat16": torch.ones(2, 3).bfloat16(), "ints": torch.ones(2, 3, dtype=torch.int64),
    "bytes": torch.ones(2, 3, dtype=torch.uint8), "bools": torch.ones(2, 3, dtype=torch.bool),
    "complex": torch.ones(2, 3, dtype=torch.complex64), "transposed": torch.ones(3, 2), "flat": torch.ones(6),
    "no dims": torch.tensor(1.0), "empty": torch.ones(0, 3), "sparse zero": torch.zeros(2, 3),
    "nan": torch.full((2, 3), float("nan")), "zero below": -torch.zeros(2, 3), "a string": "ab",
    "two strings": ["a", "b"], "None": None, "an int": 1, "a float": 1.0, "True": True,
    "pair": (torch.ones(2, 3), torch.ones(2, 3)), "a numpy scalar": np.float64(1.0),
    "scaled": 2 * torch.ones(2, 3),
}  # fmt: skip


def test_the_hash_tells_things_apart() -> None:
    hashes = {name: content_hash(value) for name, value in HASHED.items()}
    twice = {h: [n for n in hashes if hashes[n] == h] for h in hashes.values()}
    assert len(twice) == len(hashes), [names for names in twice.values() if len(names) > 1]


def test_the_hash_is_of_the_content_alone() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    same = {
        "a view": x.t().contiguous().t(),
        "a part of a larger one": torch.cat([x, x])[:3],
        "a parameter": torch.nn.Parameter(x),
        "sparse": x.to_sparse(),
        "numpy": x.numpy(),
        "conjugated twice": x.to(torch.complex64).conj().conj().real,
    }
    for name, value in same.items():
        assert content_hash(value) == content_hash(x), name
    assert content_hash({"a": x, "b": 1}) == content_hash({"b": 1, "a": x}), "the order of keys"
    assert content_hash(x.expand(2, 3, 4)[1]) == content_hash(x)


def test_the_hash_is_taken_before_any_cast() -> None:
    probes = choose_probes(DataLoader(TensorDataset(X, Y)), 8)
    cast = dataclasses.replace(probes, batch=(probes.batch[0].half(), probes.batch[1]))
    assert cast.hash == probes.hash


def test_objects_with_addresses_hash_by_content() -> None:
    class Thing:
        def __init__(self) -> None:
            self.x = torch.ones(2)

    assert content_hash(Thing()) == content_hash(Thing())


# ── the argument ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_resolve_tells_split_count_and_data_apart() -> None:
    assert (parse_probes(64).n, parse_probes(64).split, parse_probes(64).data) == (64, None, None)
    assert parse_probes(np.int64(32)).n == 32
    assert (parse_probes("train").n, parse_probes("train").split) == (64, "train")
    assert parse_probes("val").split == "val"
    for name, (batch, _, _) in BATCHES.items():
        assert parse_probes(batch).data is batch, name
    probes = as_probe_set(X[:8])
    assert parse_probes(probes).data is probes


BAD: dict[str, tuple[Any, str]] = {
    "one": (1, "probes=1 is not understood"),
    "zero": (0, "probes=0 is not understood"),
    "negative": (-4, "probes=-4"),
    "bool": (True, "probes=True"),
    "float": (64.0, "probes=64.0"),
    "a word": ("test", "probes='test'"),
    "None": (None, "probes=None"),
    "a loader": (DataLoader(TensorDataset(X, Y)), "probes= takes no loader, got DataLoader; pass a batch"),
    "a dataset": (
        TensorDataset(X, Y),
        "takes no dataset, got TensorDataset; pass a batch of it, next(iter(DataLoader(",
    ),
    "an iterator": (iter([X]), "takes no iterator, got list_iterator; pass a batch of it, next(iterator)"),
    "sparse": (X.to_sparse(), "the probes must be dense"),
    "no numbers": (X.to("meta"), "on the meta device"),
    "no rows": (X[:0], "probes= holds no rows"),
    "a number": (torch.tensor(3.0), "probes=: a batch must hold a tensor"),
    "no tensors": ({"text": ["a", "b"]}, "probes=: a batch must hold a tensor"),
    "an empty list": ([], "probes= is empty"),
    "a function": (len, "is not understood"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_probes_is_refused(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is checked below
        parse_probes(value)
    assert message in str(caught.value), f"{name}: {caught.value}"


# ── targets → columns ──────────────────────────────────────────────────────────────────────────────────────────────


def test_classes_become_one_hot_rows() -> None:
    y, reason = encode_targets(torch.tensor([2, 0, 1, 2]), 3)
    assert reason is None
    assert y.dtype == torch.float64
    assert y.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for other in (torch.int8, torch.uint8, torch.int32):
        assert torch.equal(encode_targets(torch.tensor([2, 0, 1, 2], dtype=other), 3)[0], y), other
    assert torch.equal(encode_targets(torch.tensor([[2], [0], [1], [2]]), 3)[0], y)
    assert encode_targets(torch.tensor([2, 0, 1, 2]), 5)[0].shape == (4, 5), "a class without probes keeps its column"


def test_two_classes_and_one_output_become_signs() -> None:
    for raw in (torch.tensor([0, 1, 1, 0]), torch.tensor([False, True, True, False]), torch.tensor([-1, 1, 1, -1])):
        assert encode_targets(raw, 1)[0].tolist() == [[-1], [1], [1], [-1]], raw
    assert encode_targets(torch.tensor([False, True]), 2)[0].tolist() == [[1, 0], [0, 1]]


def test_values_are_standardised() -> None:
    y, reason = encode_targets(torch.tensor([1.0, 2.0, 3.0, 6.0]), 1)
    assert reason is None
    assert y.shape == (4, 1)
    assert float(y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(y.square().mean()) == pytest.approx(1)
    columns = encode_targets(torch.tensor([[1.0, 100.0, 5.0], [2.0, -300.0, 5.0], [4.0, 0.5, 5.0]]), 3)[0]
    assert torch.allclose(columns.square().mean(0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert torch.equal(columns[:, 2], torch.zeros(3).double()), "a constant column is zero"


def test_scale_and_shift_of_values_do_not_matter() -> None:
    raw = torch.randn(20, 2, dtype=torch.float64)
    y = encode_targets(raw, 2)[0]
    for scale, shift in ((1e-12, 0.0), (1e12, -3e12), (-1.0, 7.0)):
        other = encode_targets(raw * scale + shift, 2)[0]
        assert torch.allclose(other.abs(), y.abs(), atol=1e-6), f"scale {scale}, shift {shift}"


def test_distributions_stay_as_they_are() -> None:
    smoothed = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.1, 0.8]])
    assert torch.equal(encode_targets(smoothed, 3)[0], smoothed.double())
    mixed = torch.tensor([[0.7, 0.3], [0.0, 1.0]], dtype=torch.bfloat16)
    assert encode_targets(mixed, 2)[0].tolist() == mixed.double().tolist()
    assert encode_targets(torch.tensor([[1, 0], [0, 1]]), 2)[0].tolist() == [[1, 0], [0, 1]]
    several = encode_targets(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]), 3)[0]
    assert torch.allclose(several.mean(0), torch.zeros(3).double(), atol=1e-12), "several labels are standardised"


UNDEFINED: dict[str, tuple[Any, int, str]] = {
    "absent": (None, 3, "the batch holds no targets"),
    "constant classes": (torch.tensor([1, 1, 1]), 3, "constant"),
    "constant values": (torch.tensor([0.1, 0.1, 0.1]), 1, "constant"),
    "constant rows": (torch.tensor([[0.3, 0.7], [0.3, 0.7]]), 2, "constant"),
    "constant signs": (torch.tensor([1, 1]), 1, "constant"),
    "a class beyond the outputs": (torch.tensor([0, 3, 9]), 3, "a class id is 9, but the model has 3 outputs"),
    "classes for one output": (torch.tensor([0, 1, 9]), 1, "a class id is 9, but the model has 1 output"),
    "ignored rows": (torch.tensor([0, -100, 1]), 3, "a class id is -100"),
    "-1, 0, 1 for one output": (torch.tensor([-1, 0, 1]), 1, "a class id is -1"),
    "tokens": (torch.tensor([[5, 2, 8], [1, 0, 3]]), 10, "sequences of ids"),
    "masks": (torch.zeros(4, 8, 8, dtype=torch.long), 3, r"shape \[4, 8, 8\]"),
    "images": (torch.zeros(4, 3, 8, 8), 3, r"shape \[4, 3, 8, 8\]"),
    "nan": (torch.tensor([0.0, float("nan"), 1.0]), 1, "not finite"),
    "infinite": (torch.tensor([[0.0, 1.0], [float("inf"), 1.0]]), 2, "not finite"),
    "complex": (torch.ones(3, dtype=torch.complex64), 1, "complex"),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_targets_have_a_reason(name: str) -> None:
    raw, outputs, message = UNDEFINED[name]
    y, reason = encode_targets(raw, outputs)
    assert y is None, name
    assert reason is not None
    assert re.search(message, reason), f"{name}: {reason}"

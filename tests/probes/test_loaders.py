"""Several training loaders: probes, their stream and BatchNorm's calibration are of one loader's batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends.trainer import calibration
from ntkwatch.probes import batches_of
from tests.support.runs import rows, trainer


def pairs(n: int = 96, batch: int = 16) -> DataLoader:
    return DataLoader(rows(n), batch, shuffle=True)


def bare(n: int = 96, batch: int = 16) -> DataLoader:
    """Inputs without targets, each batch a list of one tensor; of another kind."""
    return DataLoader(TensorDataset(torch.randn(n, 4, generator=torch.Generator().manual_seed(0))), batch)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows(96))


class Module(pl.LightningModule):
    """Trains on every (x, y) that it finds in its batches."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def losses(self, batch: Any) -> Iterator[Tensor]:
        if isinstance(batch, (list, tuple)) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch):
            yield nn.functional.cross_entropy(self(batch[0]), batch[1])
        elif isinstance(batch, (list, tuple, dict)):
            for part in batch.values() if isinstance(batch, dict) else batch:
                yield from self.losses(part)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.stack(list(self.losses(batch))).sum()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


TRAINING: dict[str, Callable[[], Any]] = {
    "one": pairs,
    "dict": lambda: {"labelled": pairs(), "unlabelled": pairs()},
    "list": lambda: [pairs(), pairs()],
    "dict of lists": lambda: {"a": [pairs(), bare()], "b": pairs()},
    "list of dicts": lambda: [{"a": pairs(), "b": bare()}, pairs()],
    "another kind last": lambda: {"labelled": pairs(), "other": bare()},
    "max_size_cycle": lambda: CombinedLoader({"a": pairs(32), "b": pairs()}, "max_size_cycle"),
    "min_size": lambda: CombinedLoader([pairs(), pairs(32)], "min_size"),
    "max_size, the first runs out": lambda: CombinedLoader([pairs(32), pairs()], "max_size"),
    "streams": lambda: {"a": DataLoader(Stream(), 16), "b": DataLoader(Stream(), 8)},
    "streams of few rows": lambda: {"a": DataLoader(Stream(), 4), "b": DataLoader(Stream(), 16)},
    "a stream that runs out": lambda: CombinedLoader([DataLoader(rows(10), 2), DataLoader(Stream(), 16)], "max_size"),
}
VALIDATION: dict[str, Callable[[], Any]] = {
    "no validation": lambda: None,
    "one": lambda: DataLoader(rows(64, seed=1), 32),
    "two": lambda: [DataLoader(rows(64, seed=1), 32), DataLoader(rows(32, seed=2), 32)],
}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "BatchNorm"])
@pytest.mark.parametrize("case", TRAINING)
def test_every_combination_of_loaders_is_measured(case: str, norm: bool, tmp_path: Path) -> None:
    for name, validation in VALIDATION.items() if case in ("dict", "another kind last") else [("none", lambda: None)]:
        watch = NTKWatch(probes=12, every=[0, 6], budget=None, on_error="raise")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="NTKWatch: (?!one probe)")
            trainer(tmp_path / name, watch, max_steps=6).fit(Module(norm), TRAINING[case](), validation())
        run = load_run(watch.record)
        assert run.steps == [0, 6], f"{case}, validation: {name}"
        assert run.manifest["probes"]["n"] == {"a stream that runs out": 10}.get(case, 12), case
        assert watch.last.metrics["kernel_angle"] > 0, case
        assert watch.last.metrics["centered_alignment"] is not None, f"{case}: the targets are the same loader's"
        assert ("calibrated" in str(run.manifest["baseline"])) is norm, case


def test_batches_are_taken_apart_as_their_loaders_are() -> None:
    a, b, c = (DataLoader(TensorDataset(torch.zeros(4)), 2) for _ in range(3))
    cases: list[tuple[Any, Any, list[Any]]] = [
        (a, (1, 2), [(1, 2)]),
        (a, {"x": 1}, [{"x": 1}]),
        ([a, b], [(1, 2), (3, 4)], [(1, 2), (3, 4)]),
        ({"l": a, "u": b}, {"u": 2, "l": 1}, [1, 2]),
        ({"l": [a, b], "u": c}, {"l": [1, {"x": 2}], "u": (3,)}, [1, {"x": 2}, (3,)]),
        (CombinedLoader([a, b], "max_size"), [None, 2], [None, 2]),
        ([a], [(1, 2)], [(1, 2)]),
    ]
    for loaders, batch, singles in cases:
        assert batches_of(loaders, batch) == singles, f"{batch} of {loaders}"


def test_batch_norm_is_calibrated_on_the_batch_of_the_probes_form() -> None:
    from types import SimpleNamespace

    from ntkwatch.probes import ProbeSet

    x, y, other = torch.ones(8, 6), torch.arange(8) % 2, torch.ones(5, 4, 4)
    pair = [x, y]
    probes = ProbeSet.from_batch((torch.zeros(4, 6), torch.tensor([0, 1, 0, 1])))
    cases: list[tuple[Any, Any, list[Any]]] = [  # loaders, batch, what is taken
        (pairs(), pair, [pair]),
        ({"a": bare(), "b": pairs()}, {"a": other, "b": pair}, [pair]),
        ([pairs(), pairs()], [pair, (2 * x, y)], [pair]),
        ([pairs(), pairs()], [None, pair], [pair]),
        ([bare(), bare()], [other, 2 * other], [other]),
        (pairs(), None, []),
    ]
    for loaders, batch, wanted in cases:
        taken = calibration(SimpleNamespace(train_dataloader=loaders), batch, probes)
        assert len(taken) == len(wanted), batch
        assert all(one is other for one, other in zip(taken, wanted, strict=True)), f"{batch}: took {taken}"


def test_a_training_batch_that_the_model_does_not_take_is_left_out_of_the_calibration(tmp_path: Path) -> None:
    watch = NTKWatch(every=[0], budget=None, on_error="raise")
    train = {"other": bare(), "third": DataLoader(TensorDataset(torch.zeros(96, 3, 3)), 16)}

    class Skips(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.randn(8, 6)).square().mean()

    trainer(tmp_path, watch, max_steps=2).fit(Skips(True), train, DataLoader(rows(64, seed=1), 32))
    assert "calibrated on 64 rows (the probes)" in load_run(watch.record).manifest["baseline"]

"""What one measurement runs through: packages and files, in the order in which they are entered.

    python -m tests.crossing

counts the third measurement of a two-layer MLP under NTKWatch, without pictures: functions of ours that are called, by
file and package (sub-packages count as packages of their own).
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkwatch
from ntkwatch import NTKWatch

ROOT = Path(ntkwatch.__file__).parent


class Net(pl.LightningModule):
    """Two layers, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Trace:
    """Files entered, and how often a call leads from one of ours to another."""

    def __init__(self) -> None:
        self.files: dict[Path, None] = {}
        self.changes = 0
        self._last: Path | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path.suffix == ".py":
            self.files.setdefault(path)
            self.changes += path != self._last
            self._last = path

    @property
    def packages(self) -> Counter[str]:
        return Counter(str(path.relative_to(ROOT).parent) for path in self.files)


def third_measurement() -> Trace:
    """The trace of the third measurement of a run."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    watch, trace = NTKWatch(probes=16, every=[0, 1, 2], budget=None), Trace()
    hook: Callable[..., None] = watch.on_train_batch_end

    def traced(*args: Any) -> None:
        third = len(watch.last.metrics) > 0 and watch.last.step == 1 if watch.last is not None else False
        sys.setprofile(trace if third else None)
        try:
            hook(*args)
        finally:
            sys.setprofile(None)

    watch.on_train_batch_end = traced  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", logger=False, callbacks=[watch], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Net(), DataLoader(data, 32))
    assert watch.last is not None
    assert watch.last.step == 2, watch.last
    return trace


if __name__ == "__main__":
    found = third_measurement()
    for package, count in found.packages.items():
        print(f"{package:30s} {count:3d} files")
    print(f"{len(found.packages)} packages, {len(found.files)} files, {found.changes} changes of file")

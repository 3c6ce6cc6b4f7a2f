"""The trainer configurations of the trust harness: small nets in which every disturbance of training shows.

The net has BatchNorm (its statistics move in a train-mode forward), Dropout and own noise (they draw from the global
generator), an attribute left with a graph on it, and a table built lazily in `forward` (an inference tensor there
breaks the next backward). The data augments with python's, numpy's and torch's generators.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import lightning.pytorch
import numpy as np
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.support.device import DEVICE

FEATURES, CLASSES = 6, 3
IMPORT_NAMES: dict[str, ModuleType] = {"pytorch_lightning": pytorch_lightning, "lightning.pytorch": lightning.pytorch}
QUIET: dict[str, Any] = {
    "accelerator": "cpu" if DEVICE.type == "cpu" else "gpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows of a fixed table plus noise drawn from the three global generators at every access."""

    def __init__(self, rows: int, seed: int, shape: Sequence[int] = (FEATURES,), noise: float = 0.01) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, *shape, generator=generator)
        self.targets = torch.arange(rows) % CLASSES

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(()) + float(np.random.standard_normal()) + random.random()  # noqa: NPY002 (the global one is the point)
        return self.x[index] + self.noise * noise, self.targets[index]


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """The same rows in turn; of several ranks, each reads its own."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = Augmented(rows, seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return (self.rows[i] for i in range(rank, len(self.rows), size))


class Net(nn.Module):
    """Linear–BatchNorm–ReLU–Dropout–Linear with everything on it that a careless probe would disturb."""

    def __init__(self, width: int = 8, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, width)
        self.norm = nn.BatchNorm1d(width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(width, CLASSES)
        self.checkpointed = checkpointed
        self.table: Tensor | None = None
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        if self.training:
            h = h + 0.01 * torch.randn_like(h)
        self.features = h
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, CLASSES, dtype=x.dtype, device=x.device)
        return self.head(h) * self.table


class TaskMixin:
    """A classification step; `kind` turns the few switches that the configurations need."""

    def __init__(self, net: nn.Module | None = None, kind: str = "") -> None:
        super().__init__()
        self.net = Net(checkpointed=kind == "checkpointing") if net is None else net
        self.kind = kind
        if kind == "manual":
            self.automatic_optimization = False
        if kind == "frozen":
            self.net.norm.eval()
            self.net.norm.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.kind == "manual":
            self.step_by_hand(loss)
        return loss

    def step_by_hand(self, loss: Tensor) -> None:
        """Both optimizers; the hook that automatic optimization fires before zero_grad is fired here too."""
        optimizers = self.optimizers()
        for optimizer in optimizers:
            for callback in self.trainer.callbacks:
                callback.on_before_zero_grad(self.trainer, self, optimizer)
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        if self.kind == "manual":
            body = [p for n, p in self.net.named_parameters() if not n.startswith("head")]
            return torch.optim.SGD(body, lr=0.05, momentum=0.9), torch.optim.Adam(self.net.head.parameters(), lr=0.01)
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


class PytorchLightningTask(TaskMixin, pytorch_lightning.LightningModule):
    """The task for `import pytorch_lightning`."""


class LightningTask(TaskMixin, lightning.pytorch.LightningModule):
    """The task for `import lightning.pytorch`."""


TASKS = {"pytorch_lightning": PytorchLightningTask, "lightning.pytorch": LightningTask}


def loader(
    rows: int, seed: int, shuffle: bool, workers: int = 0, persistent: bool = False, batch: int = 4
) -> DataLoader:
    return DataLoader(Augmented(rows, seed), batch, shuffle, num_workers=workers, persistent_workers=persistent)


@dataclass(frozen=True)
class Job:
    """One way of training: `build(import name)` gives the module, `trainer` the Trainer's arguments."""

    name: str
    build: Callable[[str], Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[ModuleType], list[Any]] = lambda pl: []
    loaders: Callable[[], tuple[Any, Any]] = lambda: (loader(24, 1, True), loader(8, 2, False))
    resumed: bool = False
    compiled: bool = False
    epochs: int = 2


def task(kind: str = "") -> Callable[[str], Any]:
    return lambda import_name: TASKS[import_name](kind=kind)


def with_workers(persistent: bool) -> Callable[[], tuple[Any, Any]]:
    return lambda: (loader(24, 1, True, 2, persistent), loader(8, 2, False, 2, persistent))


def ema(pl: ModuleType) -> list[Any]:
    return [pl.callbacks.EMAWeightAveraging(decay=0.8)]


def swa(pl: ModuleType) -> list[Any]:
    return [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)]


def streamed() -> tuple[Any, Any]:
    """Pairs: as many probes as are asked for come with later batches."""
    return DataLoader(Streamed(24, 1), 2), loader(8, 2, False)


STREAMS = [
    Job("stream", task(), loaders=streamed),
    Job("stream, accumulation 3", task(), {"accumulate_grad_batches": 3}, loaders=streamed),
    Job("stream, resume", task(), loaders=streamed, resumed=True, epochs=4),
    Job("stream, manual, 2 optimizers", task("manual"), loaders=streamed),
    Job("stream, bf16-mixed", task(), {"precision": "bf16-mixed"}, loaders=streamed),
    Job("stream, 64-true", task(), {"precision": "64-true"}, loaders=streamed),
    Job("stream, EMA", task(), callbacks=ema, loaders=streamed),
    Job("stream, compiled, aot_eager", task(), loaders=streamed, compiled=True),
]
JOBS = [
    Job("plain", task()),
    Job("2 workers", task(), loaders=with_workers(persistent=False)),
    Job("persistent workers", task(), loaders=with_workers(persistent=True)),
    Job("accumulation 3", task(), {"accumulate_grad_batches": 3}),
    Job("resume", task(), resumed=True, epochs=4),
    Job("manual, 2 optimizers", task("manual")),
    Job("frozen BatchNorm in eval", task("frozen")),
    Job("bf16-mixed", task(), {"precision": "bf16-mixed"}),
    Job("64-true", task(), {"precision": "64-true"}),
    Job("EMA", task(), callbacks=ema),
    Job("SWA", task(), callbacks=swa, epochs=3),
    # inference_mode off: the sanity check is the first forward, and the net's lazy table would be an inference tensor
    Job("sanity check", task(), {"num_sanity_val_steps": 2, "inference_mode": False}),
    Job("compiled, aot_eager", task(), compiled=True),
    Job("checkpointing", task("checkpointing")),
]
HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_after_backward",
    "on_train_epoch_end",
    "on_validation_batch_end",
]
ENGINES = ["functional", "layerwise"]

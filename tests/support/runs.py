"""Small training runs that tests watch: a module, its loaders and a quiet Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch


class Classifier(pl.LightningModule):
    """A small MLP with every batch form a user may have; `form` names it."""

    def __init__(self, width: int = 16, form: str = "pair", norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [nn.Linear(6, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Linear(width, 3)]
        self.net = nn.Sequential(*layers)
        self.form = form

    def forward(self, x: Tensor | None = None, **batch: Tensor) -> Any:
        logits = self.net(batch["features"] if x is None else x)
        return {"logits": logits} if self.form == "dict" else logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.form == "dict":
            logits, y = self(features=batch["features"])["logits"], batch["labels"]
        elif self.form == "bare":
            logits = self(batch)
            y = torch.zeros(len(batch), dtype=torch.long)
        else:
            logits, y = self(batch[0]), batch[1]
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train_loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def rows(n: int = 96, seed: int = 0) -> TensorDataset:
    """n examples of three separable classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=generator) + 2 * nn.functional.one_hot(y, 6)
    return TensorDataset(x, y)


class Rows(torch.utils.data.Dataset):
    """The same rows as dicts or bare tensors, without any attribute that tells the labels."""

    def __init__(self, form: str, n: int = 96) -> None:
        self.tensors_ = rows(n).tensors
        self.form = form

    def __len__(self) -> int:
        return len(self.tensors_[0])

    def __getitem__(self, i: int) -> Any:
        x, y = self.tensors_[0][i], self.tensors_[1][i]
        return {"features": x, "labels": y} if self.form == "dict" else x


def loaders(batch: int = 16, n: int = 96) -> tuple[DataLoader, DataLoader]:
    """(train, validation)."""
    return DataLoader(rows(n), batch, shuffle=True), DataLoader(rows(64, seed=1), 32)


def trainer(path: Path, *callbacks: Any, **settings: Any) -> pl.Trainer:
    """A quiet CPU Trainer; settings override."""
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "max_steps": 12, "default_root_dir": path,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **settings})


def whole_and_resumed(path: Path, between: Callable[[], object] = lambda: None, **settings: Any) -> tuple[Any, Any]:
    """The NTKWatch of a run of 12 steps, and that of the same one resumed at step 6; `between` is called before."""
    torch.manual_seed(0)
    whole, first, rest = (NTKWatch(**settings) for _ in range(3))
    trainer(path / "whole", whole).fit(Classifier(), *loaders())
    torch.manual_seed(0)
    half = trainer(path / "parts", first, max_steps=6)
    half.fit(Classifier(), *loaders())
    half.save_checkpoint(path / "a.ckpt")
    between()
    trainer(path / "parts", rest).fit(Classifier(), *loaders(), ckpt_path=path / "a.ckpt")
    return whole, rest

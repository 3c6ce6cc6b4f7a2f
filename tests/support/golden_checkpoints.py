"""The run that the golden checkpoints are of, and what makes a new one.

    python -m tests.support.golden_checkpoints NAME

A golden checkpoint is NTKWatch's state alone, beside the record that it continues. Its data and first weights are
multiples of 1/8, so that every machine hashes and starts from the same bytes. Make one before the format changes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch

HERE = Path(__file__).parent / "golden" / "checkpoints"
SAVED_AT, END = 4, 8


def eighths(*shape: int) -> Tensor:
    """Numbers from -7/8 to 7/8, the same on every machine."""
    count = torch.arange(torch.Size(shape).numel())
    return ((count * 37 + 11) % 15 - 7).reshape(shape) / 8


class Golden(pl.LightningModule):
    """4-6-3 with tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(eighths(*p.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.125)


def fit(root: Path, watch: NTKWatch, to: int, checkpoint: Path | None = None) -> pl.Trainer:
    """Train to a step, from a checkpoint if there is one."""
    trainer = pl.Trainer(
        max_steps=to, default_root_dir=root, callbacks=[watch], accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = TensorDataset(eighths(32, 4), torch.arange(32) % 3)
    trainer.fit(Golden(), DataLoader(data, 8), ckpt_path=checkpoint, weights_only=True)
    return trainer


def watched() -> NTKWatch:
    """With probes that are given: which ones would be chosen is no part of the format."""
    return NTKWatch(probes=(eighths(6, 4), torch.arange(6) % 3), every=2, budget=None)


def make(folder: Path) -> None:
    """A new golden checkpoint and its record."""
    with tempfile.TemporaryDirectory() as root:
        watch = watched()
        trainer = fit(Path(root), watch, SAVED_AT)
        folder.mkdir(parents=True)
        assert watch.record is not None
        state = trainer._checkpoint_connector.dump_checkpoint()["callbacks"]["NTKWatch"]
        state["session"]["record"] = "ntkwatch"
        torch.save({"callbacks": {"NTKWatch": state}}, folder / "state.ckpt")
        watch.record.rename(folder / "ntkwatch")


if __name__ == "__main__":
    make(HERE / sys.argv[1])

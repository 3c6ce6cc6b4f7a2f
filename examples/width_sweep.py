"""Does a parametrization learn features at every width? NTK, standard and muP networks on digits, three seeds each.

    python examples/width_sweep.py

Under the NTK parametrization, and the standard one with a learning rate of 1/width, the kernel moves less the wider
the network is (slope about -1); under muP it moves as much at every width (slope about 0). A muP implementation that
shows another slope is wrong: that is what this check is for. The figure in the README is its OUT/slopes.png, of

    python examples/width_sweep.py --widths 64 128 256 512 1024
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import NTKWatch, compare_runs, figures

BASE_WIDTH = 32
NAMES = {"ntk": "NTK", "standard": "standard, rate 1/width", "mup": "muP"}


class Scaled(nn.Linear):
    """Weights N(0, 1), scaled by √(gain / fan_in) in the forward pass: the NTK parametrization. No bias."""

    def __init__(self, n_in: int, n_out: int, gain: float) -> None:
        super().__init__(n_in, n_out, bias=False)
        nn.init.normal_(self.weight)
        self.multiplier = math.sqrt(gain / n_in)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplier * super().forward(x)


class ParityMLP(pl.LightningModule):
    """Odd or even digit, two hidden ReLU layers, ½ mean squared error, SGD; `scheme` is "ntk", "standard" or "mup".

    Outputs are those of the network minus its own at the start: muP divides the outputs by √width, so that a start of
    its own would weigh more in narrow networks than in wide ones and tilt the line.
    """

    def __init__(self, width: int, scheme: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = [(64, width), (width, width), (width, 1)]
        gamma = math.sqrt(width / BASE_WIDTH) if scheme == "mup" else 1.0
        if scheme == "standard":
            layers: list[nn.Module] = [nn.Linear(n_in, n_out, bias=False) for n_in, n_out in sizes]
            for layer, (n_in, n_out) in zip(layers, sizes, strict=True):
                nn.init.normal_(layer.weight, std=math.sqrt((2 if n_out > 1 else 1) / n_in))
        else:
            layers = [Scaled(n_in, n_out, 2 if n_out > 1 else 1) for n_in, n_out in sizes]
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.start = copy.deepcopy(self.net).requires_grad_(False)
        self.output_scale = 1 / gamma
        self.learning_rate = 1 / width if scheme == "standard" else 0.5 * gamma**2

    def forward(self, x: Tensor) -> Tensor:
        return self.output_scale * (self.net(x) - self.start(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = 0.5 * (self(x) - y).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def parity(n: int = 128) -> TensorDataset:
    """Centred digits, rows of norm √64, targets ±1 for odd and even."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
    x = torch.tensor(pixels - pixels.mean(axis=0), dtype=torch.float32)[order]
    return TensorDataset(8 * x / x.norm(dim=1, keepdim=True), 2.0 * torch.tensor(labels % 2)[order, None].float() - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("width_sweep"))
    args = parser.parse_args()

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for known in (".*does not have many workers.*", ".*number of training batches.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=known)
    data, compared = parity(), {}
    for scheme in ("ntk", "standard", "mup"):
        for width in args.widths:
            for seed in range(args.seeds):
                pl.seed_everything(seed, verbose=False)
                trainer = pl.Trainer(
                    max_steps=args.steps, callbacks=[NTKWatch(probes="train")], accelerator="cpu",
                    logger=CSVLogger(args.out / scheme, name=f"width{width}", version=f"seed{seed}"),
                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                )  # fmt: skip
                trainer.fit(ParityMLP(width, scheme), DataLoader(data, len(data)))
        comparison = compare_runs([args.out / scheme])
        slope = comparison.slopes["relative_change"]
        compared[NAMES[scheme]] = (comparison.table, slope)
        interval = f"[{slope.low:+.2f}, {slope.high:+.2f}]"
        print(f"{scheme:8s}  slope of the relative kernel change {slope.value:+.2f}  {interval}")
    title = "Change of the kernel, ‖K − K₀‖/‖K₀‖, on digits"
    figures.save(figures.slopes_together(compared, "relative_change", title=title), args.out / "slopes.png")
    print(f"wrote {args.out}/slopes.png; tables and figures of one: ntkwatch widths {args.out}/mup/")


if __name__ == "__main__":
    main()

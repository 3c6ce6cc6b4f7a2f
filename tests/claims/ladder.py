"""The ladder, C5 and C6: how rich a two-layer network on parity is, set by its output scale alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch import empirical_ntk, metrics
from ntkwatch.measurement.monitor import Monitor
from tests.claims.networks import Net, descend, parity
from tests.claims.table import Row, around, between

GAMMAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
RHO = dict(zip(GAMMAS, (0.014, 0.048, 0.224, 0.485, 0.690, 0.810), strict=True))
ANGLE = dict(zip(GAMMAS, (0.0065, 0.035, 0.180, 0.419, 0.677, 0.830), strict=True))
ACCURACY = dict(zip(GAMMAS, (0.779, 0.794, 0.885, 0.973, 0.996, 0.999), strict=True))
TRAIN, PROBES, TEST = 300, 500, 1000


@dataclass(frozen=True)
class Climb:
    """One run to 𝓛 ≤ .02: Taylor ratio on the probes, kernel angle on training and probe points, test accuracy."""

    rho: float
    angle: float
    accuracy: float


def climb(gamma: float, width: int, seed: int) -> tuple[Climb, Net, Tensor, Tensor]:
    """One run of the ladder, and the net and data to go on with."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = parity(TRAIN + TEST, generator)
    net = Net((x.shape[1], width, 1), seed, gamma=gamma * math.sqrt(width)).centre()
    seen = x[: TRAIN + PROBES]
    moving = Monitor(net, x[TRAIN : TRAIN + PROBES], engine="layerwise", diagnostics=["taylor_ratio"])
    turning = Monitor(net, seen, engine="layerwise", diagnostics=["kernel_angle"])
    moving.measure(0)
    turning.measure(0)
    go_down(net, x[:TRAIN], y[:TRAIN], 0.02, 1500)
    found = {**moving.measure(1).metrics, **turning.measure(1).metrics}
    with torch.no_grad():
        right = (net(x[TRAIN : TRAIN + PROBES]).sign() == y[TRAIN : TRAIN + PROBES]).double().mean()
    rho, angle = found["taylor_ratio"], found["kernel_angle"]
    assert rho is not None
    assert angle is not None
    return Climb(rho, angle, float(right)), net, x, y


def go_down(net: Net, x: Tensor, y: Tensor, stop: float, steps: int) -> None:
    """Full-batch descent at lr = ½·N/λ_max(K_t), worked out every 25 steps, to a loss of `stop`."""
    for _ in range(steps // 25):
        lr = 0.5 * len(x) / float(torch.linalg.matrix_norm(kernel(net, x), 2))
        losses = descend(net, x, y, lr, 25, stop)
        if losses[-1] <= stop:
            break


def kernel(net: Net, x: Tensor) -> Tensor:
    """The two-layer network's kernel in closed form: for the learning rate alone."""
    w, v = (p.detach() for p in net.weights)
    a, b = net.multipliers
    h = x @ w.T * a
    active = (h > 0).float() * v
    phi = torch.relu(h)
    return (b**2 * (phi @ phi.T) + (a * b) ** 2 * (x @ x.T) * (active @ active.T)) / net.gamma**2


def ladder(quick: bool) -> list[Row]:
    """The ladder itself: ρ and angle within 10 % at each γ_0, and C5, the spread of ρ over a 16× width range."""
    gammas: Sequence[float] = (0.3, 1.0) if quick else GAMMAS
    width, seeds = (512, (1,)) if quick else (2048, (1, 2, 3))
    rows, means = [], {}
    for gamma in gammas:
        runs = [climb(gamma, width, seed)[0] for seed in seeds]
        rho, angle, accuracy = (
            sum(getattr(run, name) for run in runs) / len(runs) for name in ("rho", "angle", "accuracy")
        )
        means[gamma] = rho
        rows.append(around("ladder", f"γ₀ = {gamma:g}: Taylor ratio ρ, n = {width}", rho, RHO[gamma]))
        rows.append(around("ladder", f"γ₀ = {gamma:g}: kernel angle", angle, ANGLE[gamma], 0.25 if quick else 0.1))
        rows.append(between("ladder", f"γ₀ = {gamma:g}: test accuracy", accuracy, ACCURACY[gamma] - 0.04, 1.0))
    for gamma in (0.3, 1.0):
        others = [
            sum(climb(gamma, n, seed)[0].rho for seed in seeds) / len(seeds) for n in ((128,) if quick else (128, 512))
        ]
        spread = max(means[gamma], *others) / min(means[gamma], *others)
        rows.append(between("C5", f"γ₀ = {gamma:g}: max/min of ρ over a {width // 128}× width range", spread, 1.0, 1.4))
    return rows


def after(quick: bool) -> list[Row]:
    """C6: regression with the kernel after training far above regression with K_0 (which γ_0 does not change)."""
    width, draws = (512, 2) if quick else (2048, 8)
    start = []
    for seed in range(1, draws + 1):
        x, y = parity(TRAIN + TEST, torch.Generator().manual_seed(1000 + seed))
        start.append(_accuracy(Net((x.shape[1], width, 1), seed), x, y))
    what = f"test accuracy of regression with K₀, mean of {draws} draws"
    rows = [between("C6", what, sum(start) / draws, 0.5, 0.82)]
    for gamma in (1.0,) if quick else (0.1, 0.3, 1.0):
        _, net, x, y = climb(gamma, width, 1)
        go_down(net, x[:TRAIN], y[:TRAIN], 0.01, 1500)
        what = f"γ₀ = {gamma:g}: test accuracy of regression with K_T"
        rows.append(between("C6", what, _accuracy(net, x, y), 0.97, 1.0))
    return rows


def _accuracy(net: Net, x: Tensor, y: Tensor) -> float:
    k = empirical_ntk(net, x, engine="layerwise")
    train = k[:TRAIN, :TRAIN]
    guess = metrics.kernel_regression(train, y[:TRAIN], k[TRAIN:, :TRAIN], 1e-4 * float(train.trace()) / TRAIN)
    return float((guess.sign() == y[TRAIN:]).double().mean())

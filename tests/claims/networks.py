"""Networks and data of the claims: NTK parametrization with multipliers, parity, real digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Fully connected, no biases; weights N(0, std²) with a multiplier each, the outputs minus f_0, over γ.

    widths: from inputs to outputs. Multipliers default to √(gain/fan_in) on hidden layers and 1/√fan_in on the readout.
    """

    def __init__(
        self,
        widths: Sequence[int],
        seed: int,
        *,
        gamma: float = 1.0,
        gain: float = 2.0,
        standard: bool = False,
        std: float = 1.0,
        activation: Callable[[Tensor], Tensor] = torch.relu,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gamma, self.activation = gamma, activation
        fans = list(widths[:-1])
        scales = [math.sqrt((gain if i < len(fans) - 1 else 1.0) / fan) for i, fan in enumerate(fans)]
        self.multipliers = [1.0] * len(fans) if standard else scales
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(out, fan, generator=generator) * std * (s if standard else 1.0))
            for out, fan, s in zip(widths[1:], fans, scales, strict=True)
        )
        self.start: list[Tensor] | None = None

    def raw(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for i, (w, m) in enumerate(zip(weights, self.multipliers, strict=True)):
            x = x @ w.T * m
            x = self.activation(x) if i < len(weights) - 1 else x
        return x / self.gamma

    def centre(self) -> Net:
        """From now on outputs are f − f_0."""
        self.start = [w.detach().clone() for w in self.weights]
        return self

    def forward(self, x: Tensor) -> Tensor:
        f = self.raw(x, list(self.weights))
        if self.start is None:
            return f
        with torch.no_grad():
            f_0 = self.raw(x, self.start)
        return f - f_0


def half_mean_square(f: Tensor, y: Tensor) -> Tensor:
    """½·mean((f − y)²)."""
    return 0.5 * (f - y).square().mean()


def descend(model: Net, x: Tensor, y: Tensor, lr: float, steps: int, stop: float = 0.0) -> list[float]:
    """Full-batch gradient descent on ½·mean((f − y)²), until the loss is `stop`; the losses before each step."""
    losses = []
    f_0 = torch.zeros(())
    if model.start is not None:  # constant in θ: worked out once
        with torch.no_grad():
            f_0 = model.raw(x, model.start)
    weights = list(model.weights)
    for _ in range(steps):
        loss = half_mean_square(model.raw(x, weights) - f_0, y)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 1e8 or losses[-1] <= stop:
            break
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                w -= lr * g
    return losses


def parity(count: int, generator: torch.Generator, d: int = 30, k: int = 2) -> tuple[Tensor, Tensor]:
    """±1 inputs [count, d] and the product of their first k, [count, 1]."""
    x = torch.randint(0, 2, (count, d), generator=generator).float() * 2 - 1
    return x, x[:, :k].prod(1, keepdim=True)


def digits(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Real 8×8 digits, centred, rows of norm √64, and their classes; a seeded draw."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))[:count]
    x = torch.tensor(data.data, dtype=torch.float32)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True) * 8
    return x[order], torch.tensor(data.target)[order]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log value on log width over all points."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).T
    return float((x @ y) / (x @ x))

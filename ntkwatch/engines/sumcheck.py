"""The self-check on all probes: backward passes of weighted sums against the engine's kernel.

For g = ∇ Σ_i w_i Σ_c m_c f_c(x_i), ‖g‖² equals wᵀKw, where K is the kernel of the single output Σ_c m_c f_c. The check
costs about two more outputs and detects a rule that is wrong on one probe only. It runs once, when an engine is chosen:
rules do not depend on parameter values, and repeating it would double the cost of a measurement. Gradients left in
`.grad` may appear later, so every kernel checks for them (`returned_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.base import Engine, Kernel
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.capture_points import few
from ntkwatch.engines.coupling import MANY
from ntkwatch.engines.functional import math_attention
from ntkwatch.engines.grad_attribute import returned_gradients
from ntkwatch.engines.graph import bytes_inside
from ntkwatch.engines.memory import backing_off, limit_bytes
from ntkwatch.engines.selfcheck import Mixed, not_finite, wide_row
from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of, take


@dataclass(frozen=True)
class Block:
    """Some of the probes, their weights w [n], and ‖g‖² of their weighted sum by parameter."""

    probes: Any
    w: Tensor
    squares: dict[str, float]


class SumCheck:
    """Backward passes of weighted sums over all probes, computed once for all engines.

    Blocks have a size at which examples were found uncoupled; all pairs of many probes would cost as much as the
    kernel.

    Raises:
        UnsupportedModel: gradients are not finite, or arrive through `.grad`; the message names the parameters.
    """

    def __init__(self, network: Network, x: Any, chunk_size: int | None = None) -> None:
        self._network, n = Mixed(network, beside=False), batch_size(inputs_of(x))
        size = min(n, MANY, chunk_size or n)
        rows = [slice(i, i + size) for i in (*range(0, n - size, size), n - size)]  # the last two may overlap
        w, most = _weights(n), self._affordable(x)
        with returned_gradients(network):
            self._blocks = [self._block(take(x, some), w[some], most) for some in rows]
        if not all(torch.tensor(list(block.squares.values())).isfinite().all() for block in self._blocks):
            raise UnsupportedModel(not_finite(network, x))

    def error(self, engine: Engine) -> tuple[float, str]:
        """The largest error of the engine's kernels beyond rounding, and the parameter with the largest deviation."""
        kernels = (
            engine.kernel(self._network, block.probes, layers="trace", precision="single") for block in self._blocks
        )
        return max(_deviation(kernel, block) for kernel, block in zip(kernels, self._blocks, strict=True))

    def _block(self, x: Any, w: Tensor, most: int) -> Block:
        """The weighted sum over a block, with as many probes at a time as fit in memory."""

        def attempt(size: int) -> dict[str, float]:
            total: dict[str, Tensor] = {}
            for part, weights in zip(blocks(x, size), w.split(size), strict=True):
                for name, g in self._gradients(part, weights).items():
                    total[name] = total[name].add_(g) if name in total else g
            norms = {name: torch.linalg.vector_norm(g, dtype=torch.float64) for name, g in total.items()}
            return {name: float(norm) ** 2 for name, norm in norms.items()}

        return Block(x, w, backing_off(attempt, min(len(w), most), self._network.device))

    def _gradients(self, x: Any, w: Tensor) -> dict[str, Tensor]:
        """The gradients of Σ_i w_i f(x_i) by parameter, without those that it does not depend on."""
        with math_attention():
            f = self._network.outputs(x)
        if not f.requires_grad:
            return {}
        names, parameters = zip(*self._network.parameters.items(), strict=True)
        grads = torch.autograd.grad(f, parameters, w[:, None].to(f), allow_unused=True)
        return {name: wide_row(g) for name, g in zip(names, grads, strict=True) if g is not None}

    def _affordable(self, x: Any) -> int:
        """Probes per pass within the memory limit of a kernel."""
        some = few(x)
        each = 2 * bytes_inside(self._network.outputs(some)) / batch_size(inputs_of(some))
        return max(1, int(limit_bytes(self._network.device) / max(each, 1.0)))


def _weights(n: int) -> Tensor:
    """Weights of both signs, so that similar gradients do not cancel each other's errors; exact in every type."""
    generator = torch.Generator().manual_seed(0)
    size, sign = (torch.randint(k, (n,), generator=generator, device="cpu") for k in (5, 2))
    return (size + 2) / 4 * (2 * sign - 1)


def _deviation(kernel: Kernel, block: Block) -> tuple[float, str]:
    """|wᵀKw − ‖g‖²| summed over parameters, beyond the noise floor, and the parameter with the largest deviation.

    It is relative to the probes' own terms, added in quadrature as independent errors are.
    """
    w = block.w.double()

    def form(k: Tensor) -> float:
        return float(w @ k.cpu().double() @ w)

    off = {name: abs(form(k) - block.squares.get(name, 0.0)) for name, k in kernel.layers.items()}
    error = max(sum(off.values()), abs(form(kernel.value) - sum(block.squares.values())))
    own = w.square() * kernel.value.diagonal().cpu().double()
    beyond = max(0.0, error - kernel.noise_floor * float(own.sum()))
    scale = float(torch.linalg.vector_norm(own))
    return beyond / scale if scale else beyond, max(off, key=off.__getitem__)

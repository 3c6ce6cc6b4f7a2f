"""The self-check on all probes: a backward pass of a weighted sum over them against the engine's kernel.

Of g = ∇ Σ_i w_i Σ_c m_c f_c(x_i), ‖g‖² is wᵀKw, K being the kernel of the one output Σ_c m_c f_c. It costs about as
much as two more outputs, and a rule that is wrong on the last probe alone shows. It belongs to the choice of an engine
and is made once: rules do not depend on the parameters' values, and at every measurement it would cost as much again.
What may change later, gradients that are left in `.grad`, is looked for in every kernel (`returned`).
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
    """Some of the probes, the weights w of their sum [n], and its ‖g‖² by parameter."""

    probes: Any
    w: Tensor
    squares: dict[str, float]


class SumCheck:
    """Backward passes of weighted sums over all probes, made once for all engines.

    In blocks of a size that examples were found not to be coupled in: all pairs of many probes would cost as much as
    the kernel itself.

    Raises:
        UnsupportedModel: gradients are not finite, or arrive through `.grad`, naming whose.
    """

    def __init__(self, network: Network, x: Any, chunk_size: int | None = None) -> None:
        self._network, n = Mixed(network, beside=False), batch_size(inputs_of(x))
        size = min(n, MANY, chunk_size or n)
        rows = [slice(i, i + size) for i in (*range(0, n - size, size), n - size)]  # some may be in the last two
        w, most = _weights(n), self._affordable(x)
        with returned_gradients(network):
            self._blocks = [self._block(take(x, some), w[some], most) for some in rows]
        if not all(torch.tensor(list(block.squares.values())).isfinite().all() for block in self._blocks):
            raise UnsupportedModel(not_finite(network, x))

    def error(self, engine: Engine) -> tuple[float, str]:
        """How far the engine's kernels are from the sums, beyond rounding, and the parameter that is off most."""
        kernels = (
            engine.kernel(self._network, block.probes, layers="trace", precision="single") for block in self._blocks
        )
        return max(_deviation(kernel, block) for kernel, block in zip(kernels, self._blocks, strict=True))

    def _block(self, x: Any, w: Tensor, most: int) -> Block:
        """The sum over a block, of as many probes at a time as memory holds."""

        def attempt(size: int) -> dict[str, float]:
            total: dict[str, Tensor] = {}
            for part, weights in zip(blocks(x, size), w.split(size), strict=True):
                for name, g in self._gradients(part, weights).items():
                    total[name] = total[name].add_(g) if name in total else g
            norms = {name: torch.linalg.vector_norm(g, dtype=torch.float64) for name, g in total.items()}
            return {name: float(norm) ** 2 for name, norm in norms.items()}

        return Block(x, w, backing_off(attempt, min(len(w), most), self._network.device))

    def _gradients(self, x: Any, w: Tensor) -> dict[str, Tensor]:
        """Of Σ_i w_i f(x_i), by parameter; those that it does not depend on are left out."""
        with math_attention():
            f = self._network.outputs(x)
        if not f.requires_grad:
            return {}
        names, parameters = zip(*self._network.parameters.items(), strict=True)
        grads = torch.autograd.grad(f, parameters, w[:, None].to(f), allow_unused=True)
        return {name: wide_row(g) for name, g in zip(names, grads, strict=True) if g is not None}

    def _affordable(self, x: Any) -> int:
        """Probes of which a pass takes no more than a kernel may."""
        some = few(x)
        each = 2 * bytes_inside(self._network.outputs(some)) / batch_size(inputs_of(some))
        return max(1, int(limit_bytes(self._network.device) / max(each, 1.0)))


def _weights(n: int) -> Tensor:
    """Of either sign, so that gradients that are alike do not hide one another; exact in every type."""
    generator = torch.Generator().manual_seed(0)
    size, sign = (torch.randint(k, (n,), generator=generator, device="cpu") for k in (5, 2))
    return (size + 2) / 4 * (2 * sign - 1)


def _deviation(kernel: Kernel, block: Block) -> tuple[float, str]:
    """|wᵀKw − ‖g‖²|, summed over parameters, beyond the noise floor, and the parameter that is off most.

    Relative to what probes give each by itself, added up as independent errors of theirs are.
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

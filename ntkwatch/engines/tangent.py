"""J_0·v: the first-order change of the outputs along a direction in parameter space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ntkwatch.engines.functional import math_attention
from ntkwatch.engines.memory import is_out_of_memory
from ntkwatch.model import Network, UnsupportedModel

_FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError)


def jvp(
    network: Network, x: Any, state0: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, str]:
    """Outputs and their derivative along `direction`, both at `state0`.

    Args:
        state0: parameters and buffers by name; missing ones are the module's own.
        direction: by parameter name; missing parameters do not move.

    Returns:
        f_0 [n, C], J_0·v [n, C], and the method: "forward mode", "double backward" (if an operation has no forward
            rule) or "central differences" (if it has no second derivative either; about half the digits).
    """
    moving = {name: v for name, v in direction.items() if name in network.parameters}
    base = {name: state0.get(name, p).detach() for name, p in network.parameters.items() if name in moving}
    given = {**state0, **base}
    for how, method in (("forward mode", _forward), ("double backward", _double_backward)):
        try:
            with math_attention():
                f, j = method(network, x, given, moving)
            return f.detach(), j.detach(), how
        except UnsupportedModel:
            raise
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
    f, j = _differences(network, x, given, moving)
    return f, j, "central differences"


def warm_up() -> None:
    """Loads what torch needs for the first forward-mode product, so that no measurement is charged for it."""
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _forward(
    network: Network, x: Any, state: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(state[name].detach().clone(), v.detach().to(state[name]))
            for name, v in direction.items()
        }
        f, j = forward_ad.unpack_dual(network.outputs(x, {**state, **duals}))
        return f, torch.zeros_like(f) if j is None else j


def _double_backward(
    network: Network, x: Any, state: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """J v = ∂⟨Jᵀu, v⟩/∂u: the vector-Jacobian product is linear in u."""
    leaves = {name: state[name].detach().requires_grad_() for name in direction}
    f = network.outputs(x, {**state, **leaves})
    u = torch.zeros_like(f, requires_grad=True)
    grads = torch.autograd.grad(f, list(leaves.values()), u, create_graph=True, allow_unused=True)
    pairs = [(g, direction[name].to(g)) for name, g in zip(leaves, grads, strict=True) if g is not None]
    if not pairs:
        return f, torch.zeros_like(f)
    inner = torch.stack([(g * v).sum() for g, v in pairs]).sum()
    return f, torch.autograd.grad(inner, u)[0]


def _differences(
    network: Network, x: Any, state: Mapping[str, Tensor], direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    size = float(torch.stack([v.double().norm() for v in direction.values()]).norm())
    scale = float(torch.stack([state[name].double().norm() for name in direction]).norm())
    with torch.no_grad():
        f = network.outputs(x, state)
        if size == 0:
            return f, torch.zeros_like(f)
        step = torch.finfo(f.dtype).eps ** (1 / 3) * max(scale, 1.0) / size

        def moved(sign: int) -> Tensor:
            shifted = {n: state[n] + sign * step * v.to(state[n]) for n, v in direction.items()}
            return network.outputs(x, {**state, **shifted}).double()

        return f, ((moved(1) - moved(-1)) / (2 * step)).to(f.dtype)

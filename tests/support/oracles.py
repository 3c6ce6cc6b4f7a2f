"""The naive oracle: a double loop over torch.autograd.grad, one example and one output at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkwatch.model import Network, batch_size, inputs_of, take


def gradients(
    module: nn.Module, batch: Any, outputs: Callable[[nn.Module, Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """{parameter name: [n, C, P]}: every example goes through the model alone."""
    network = Network(module, outputs)
    parameters = list(network.parameters.values())
    rows: dict[str, list[Tensor]] = {name: [] for name in network.parameters}
    for i in range(batch_size(inputs_of(batch))):
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):  # recurrent layers in eval mode
            f = network.outputs(take(batch, slice(i, i + 1)))[0]
        grads = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in f]
        for k, (name, p) in enumerate(network.parameters.items()):
            each = [torch.zeros_like(p) if g[k] is None else g[k].to_dense() for g in grads]
            each = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in each]
            rows[name].append(torch.stack(each).reshape(len(each), -1))
    return {name: torch.stack(found) for name, found in rows.items()}


def naive_layers(
    module: nn.Module, x1: Any, x2: Any = None, outputs: Callable[[nn.Module, Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """Θ per parameter, [n1, C, n2, C]."""
    j1 = gradients(module, x1, outputs)
    j2 = j1 if x2 is None else gradients(module, x2, outputs)
    return {name: torch.einsum("ncp,mdp->ncmd", j1[name], j2[name]) for name in j1}


def naive_ntk(
    module: nn.Module, x1: Any, x2: Any = None, outputs: Callable[[nn.Module, Any], Tensor] | None = None
) -> Tensor:
    """Θ = J Jᵀ, [n1, C, n2, C]."""
    return torch.stack(list(naive_layers(module, x1, x2, outputs).values())).sum(0)


def reduced(theta: Tensor, reduction: str) -> Tensor:
    """The reductions of SCIENCE, section 1, written out index by index."""
    c = theta.shape[1]
    if reduction == "full":
        return theta
    if reduction == "sum":
        return torch.einsum("ncmd->nm", theta) / c
    blocks = torch.stack([theta[:, i, :, i] for i in range(c)])
    return blocks if reduction == "blocks" else sum(blocks) / c


def trained_ntk(module: nn.Module, batch: Any) -> Tensor:
    """Θ [n, C, n, C] of what training sees: `.grad` after `backward()`, of one example and output at a time."""
    network = Network(module)
    kept = {name: p.grad for name, p in network.parameters.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in network.parameters}
    n, outputs = batch_size(inputs_of(batch)), network.outputs(take(batch, slice(0, 1))).shape[1]
    for i in range(n):
        for c in range(outputs):
            for p in network.parameters.values():
                p.grad = None
            network.outputs(take(batch, slice(i, i + 1)))[0, c].backward()
            for name, p in network.parameters.items():
                rows[name].append((torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten())
    for name, p in network.parameters.items():
        p.grad = kept[name]
    j = [torch.stack(each).unflatten(0, (n, outputs)) for each in rows.values()]
    return torch.stack([torch.einsum("ncp,mdp->ncmd", each, each) for each in j]).sum(0)

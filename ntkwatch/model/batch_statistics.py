"""BatchNorm's running statistics: which there are, and what they would be after the batches at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ntkwatch.model.module import Network


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """running_mean and running_var of every normalisation that tracks them, by buffer name."""
    ends = ("running_mean", "running_var")
    return {name: b for name, b in module.named_buffers() if name.rpartition(".")[2] in ends}


def untracked_statistics(module: nn.Module) -> bool:
    """Whether some BatchNorm still has the statistics (0, 1) it was built with."""
    counts = (m.num_batches_tracked for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats)
    return any(count is not None and int(count) == 0 for count in counts)


def calibrated_statistics(network: Network, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The running statistics that these batches give at the present parameters, pooled over batches and uses.

    Each BatchNorm normalises by the batch's own mean and variance on the way, as it does in training, though the module
    stays in its mode and nothing in it changes.
    """
    names = {id(m): name for name, m in network.module.named_modules() if isinstance(m, _BatchNorm)}
    clones = {name: b.clone() for name, b in running_statistics(network.module).items()}
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.running_mean is None:
            return
        name, x = names[id(module)], args[0].detach()
        x = x.transpose(0, 1).flatten(1).double()
        count = torch.tensor(float(x.shape[1]), dtype=torch.float64)
        mean, square = x.mean(1), x.square().mean(1)
        variance = x.var(1, unbiased=False)  # what normalises; the unbiased one is what is kept
        _assign(clones, name, mean, variance)
        old = sums.get(name)
        sums[name] = (count, mean * count, square * count) if old is None else (
            old[0] + count, old[1] + mean * count, old[2] + square * count)  # fmt: skip

    handles = [m.register_forward_pre_hook(before) for m in network.module.modules() if id(m) in names]
    try:
        with torch.no_grad():
            for batch in batches:
                network.outputs(batch, clones)
    finally:
        for handle in handles:
            handle.remove()
    for name, (count, total, square) in sums.items():
        mean = total / count
        variance = (square / count - mean.square()) * (count / (count - 1).clamp(min=1))
        _assign(clones, name, mean, variance)
    return clones


def _assign(clones: dict[str, Tensor], name: str, mean: Tensor, variance: Tensor) -> None:
    prefix = f"{name}." if name else ""
    clones[f"{prefix}running_mean"].copy_(mean)
    clones[f"{prefix}running_var"].copy_(variance)

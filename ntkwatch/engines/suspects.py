"""Which module to name when a model is refused: found by its kind, or by what it is given in a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ntkwatch.model import Network


def suspect(network: Network) -> str:
    """The module that most likely couples examples, in words; nothing where none is known to."""
    for name, module in network.module.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if norm and "Instance" not in type(module).__name__ and (module.training or not module.track_running_stats):
            return f" (module {name or 'itself'}, {type(module).__name__}, normalises by the batch's own statistics)"
    return ""


def nested(network: Network, forward: Callable[[], object]) -> str:
    """The first module that `forward` hands a nested tensor to, or that gives one, and what to do about it."""
    seen: list[str] = []
    names = {id(module): name for name, module in network.module.named_modules()}

    def look(module: nn.Module, args: Any, result: Any) -> None:
        if any(isinstance(t, Tensor) and t.is_nested for t in tree_leaves((args, result))):
            seen.append(f"module {names[id(module)] or 'itself'} ({type(module).__name__})")

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in network.module.modules():
            hooks.enter_context(module.register_forward_hook(look))
        forward()
    return (
        f"{seen[0] if seen else 'the model'} computes on nested tensors, whose gradients cannot be read by example: "
        "pad them (torch.nested.to_padded_tensor) and mask"
    )

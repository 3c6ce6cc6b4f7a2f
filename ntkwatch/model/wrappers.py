"""Modules as plain autograd sees them: unwrapped, not compiled, fused or re-entering, tensors where they are held."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        elif isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        else:
            return module


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Compiled modules and functions run eagerly inside: a probe adds no graph and its backward is seen op by op."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Attention and encoder layers run as they do in training inside.

    Without gradients torch may take a fused path for them, which rounds otherwise and gives zeros at padded positions:
    outputs of two paths cannot be subtracted.
    """
    kept = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(kept)


class _NoCheckpoint:
    """Stands in for reentrant checkpointing, whose backward pass cannot be asked for single gradients."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextlib.contextmanager
def not_reentrant() -> Iterator[None]:
    """Reentrant checkpoints keep their activations inside; non-reentrant ones are as they were."""
    module: Any = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        yield
        return
    kept, module.CheckpointFunction = module.CheckpointFunction, _NoCheckpoint
    try:
        yield
    finally:
        module.CheckpointFunction = kept


def attribute_paths(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter or buffer → where the same tensor is held, each place once.

    torch ties weights by name: of a module that is there under two names it swaps one attribute twice, and puts back
    what it had swapped in.
    """
    held: dict[int, list[str]] = {}
    for prefix, owner in module.named_modules():
        for name, t in (*owner._parameters.items(), *owner._buffers.items()):
            if t is not None:
                held.setdefault(id(t), []).append(f"{prefix}.{name}" if prefix else name)
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tuple(held[id(t)]) for name, t in named}

"""Tensors that have a shape and no memory, with an answer in a fraction of the time where an operation only views them.

A rehearsal asks some ten thousand small operations of torch's fake tensors, more than half of them views and questions
after the device. Their general way through the dispatcher takes 80 µs each; a view of a fake tensor is a view of the
tensor without memory inside it, which takes a fifth of that.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from ntkwatch.model import Network, map_leaves

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_VIEWS = frozenset(
    (
        aten.view.default, aten.slice.Tensor, aten.permute.default, aten.detach.default, aten.select.int,
        aten.expand.default, aten.transpose.int, aten.unbind.int, aten.alias.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.t.default,
    )
)  # fmt: skip


@contextlib.contextmanager
def _as_if_real() -> Iterator[None]:
    """transformers' models take another way through their masks where tensors are fake: here it is not told so.

    It asks isinstance(x, FakeTensor) and has no switch (5.23): the function is replaced meanwhile.
    """
    module: Any = sys.modules.get("transformers.utils.import_utils")
    if not hasattr(module, "is_fake_tensor"):
        yield
        return
    kept, module.is_fake_tensor = module.is_fake_tensor, lambda x: False
    try:
        yield
    finally:
        module.is_fake_tensor = kept


@contextlib.contextmanager
def shapes_only(
    network: Network, x: Any, state: Mapping[str, Tensor] | None
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The batch and the whole state as tensors that have a shape and no memory.

    A model whose shapes depend on values raises something inside.
    """
    everything = {**dict(network.module.named_parameters()), **network.buffers, **(state or {})}
    with _as_if_real(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes: dict[str, Tensor] = {name: mode.from_tensor(t.detach()) for name, t in everything.items()}
        batch = map_leaves(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, x)
        yield batch, fakes


def quickly(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives of a tensor without memory, where it asks for its device or views it; None where it does not.

    Tensors that stand for a known constant are left to the fake mode, which keeps the constant.
    """
    if not args or not isinstance(args[0], FakeTensor):
        return None
    fake: Any = args[0]
    if func is _DEVICE:
        return fake.fake_device
    if func not in _VIEWS or kwargs or fake.constant is not None:
        return None
    mode, device = fake.fake_mode, fake.fake_device
    with in_kernel_invocation_manager(mode):
        views = func(*args)
    if isinstance(views, Tensor):
        return FakeTensor(mode, views, device)
    return [FakeTensor(mode, view, device) for view in views]

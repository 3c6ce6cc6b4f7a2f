"""What a piece of work costs as a count, the same on any machine and at any load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def calls(work: Callable[[], object]) -> int:
    """Functions of Python and C that this thread enters."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


class Entries(TorchDispatchMode):
    """Entries of all tensors that operations gave inside, views included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

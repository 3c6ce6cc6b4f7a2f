"""Gradients for all C outputs, either as C separate tensors or stacked in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerOutput:
    """C tensors of one shape.

    Stacking large tensors would cost as much memory traffic as the backward passes, so sequential passes leave them
    separate. A batched pass returns them stacked, and one call then processes all outputs.

    Attributes:
        parts: [C, *shape], or C × [*shape].
    """

    parts: Tensor | tuple[Tensor, ...]

    @property
    def together(self) -> bool:
        """Whether they are stacked in one tensor."""
        return isinstance(self.parts, Tensor)

    @property
    def shape(self) -> torch.Size:
        """Shape of each tensor."""
        return self.parts.shape[1:] if isinstance(self.parts, Tensor) else self.parts[0].shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of each tensor."""
        return len(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of each tensor."""
        return self.parts.stride()[1:] if isinstance(self.parts, Tensor) else self.parts[0].stride()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors."""
        return self._any.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._any.device

    @property
    def _any(self) -> Tensor:
        return self.parts if isinstance(self.parts, Tensor) else self.parts[0]

    def __len__(self) -> int:
        return self.parts.shape[0] if isinstance(self.parts, Tensor) else len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts.unbind() if isinstance(self.parts, Tensor) else self.parts)

    def __getitem__(self, c: int) -> Tensor:
        return self.parts[c]

    def over(self, fn: Callable[[Tensor], Tensor]) -> PerOutput:
        """Applies `fn`, which must count dimensions from the right, to the stacked tensor or to each tensor."""
        return PerOutput(fn(self.parts) if isinstance(self.parts, Tensor) else tuple(map(fn, self.parts)))

    def copy_to(self, out: Tensor) -> None:
        """Copies the tensors into `out` [C, *shape]."""
        if isinstance(self.parts, Tensor):
            out.copy_(self.parts)
            return
        for part, to in zip(self.parts, out, strict=True):
            to.copy_(part)

    def stacked(self) -> Tensor:
        """[C, *shape]; a copy if they are separate."""
        return self.parts if isinstance(self.parts, Tensor) else torch.stack(self.parts)

    @property
    def place(self) -> tuple[int, ...]:
        """An identifier of their memory: equal for the gradients of a weight used at one position and of its bias."""
        tensors = (self.parts,) if isinstance(self.parts, Tensor) else self.parts
        places = ((t.untyped_storage()._cdata, t.storage_offset(), *t.stride()) for t in tensors)
        return (*tensors[0].shape, *(number for place in places for number in place))


def combined(fn: Callable[[list[Tensor]], Tensor], some: Sequence[PerOutput]) -> PerOutput:
    """Applies `fn`, which counts dimensions from the right, to the list of tensors that each output has in `some`."""
    if all(each.together for each in some):
        return PerOutput(fn([each.stacked() for each in some]))
    return PerOutput(tuple(fn(list(each)) for each in zip(*some, strict=True)))

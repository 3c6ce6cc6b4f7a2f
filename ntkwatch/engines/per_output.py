"""What there is of every output, C tensors of one shape: apart as passes in turn gave them, or in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerOutput:
    """C tensors of one shape.

    Putting large ones together would cost as much memory traffic as the passes that gave them; where passes are made
    at once they come together, and what is done with them takes one call instead of C.

    Attributes:
        parts: [C, *shape], or C of [*shape].
    """

    parts: Tensor | tuple[Tensor, ...]

    @property
    def together(self) -> bool:
        """Whether they are one tensor."""
        return isinstance(self.parts, Tensor)

    @property
    def shape(self) -> torch.Size:
        """Of each."""
        return self.parts.shape[1:] if isinstance(self.parts, Tensor) else self.parts[0].shape

    @property
    def ndim(self) -> int:
        """Of each."""
        return len(self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of each."""
        return self.parts.stride()[1:] if isinstance(self.parts, Tensor) else self.parts[0].stride()

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def device(self) -> torch.device:
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
        """`fn` of each. It counts dimensions from the right, so that it does for all what it does for one."""
        return PerOutput(fn(self.parts) if isinstance(self.parts, Tensor) else tuple(map(fn, self.parts)))

    def copy_to(self, out: Tensor) -> None:
        """Into [C, *shape]."""
        if isinstance(self.parts, Tensor):
            out.copy_(self.parts)
            return
        for part, to in zip(self.parts, out, strict=True):
            to.copy_(part)

    def stacked(self) -> Tensor:
        """[C, *shape]: a copy where they are apart."""
        return self.parts if isinstance(self.parts, Tensor) else torch.stack(self.parts)

    @property
    def place(self) -> tuple[int, ...]:
        """Where they lie in memory: the same for the gradients of a weight of one position and those of its bias."""
        tensors = (self.parts,) if isinstance(self.parts, Tensor) else self.parts
        places = ((t.untyped_storage()._cdata, t.storage_offset(), *t.stride()) for t in tensors)
        return (*tensors[0].shape, *(number for place in places for number in place))


def combined(fn: Callable[[list[Tensor]], Tensor], some: Sequence[PerOutput]) -> PerOutput:
    """`fn` of the tensors that several have of the same output; it counts dimensions from the right too."""
    if all(each.together for each in some):
        return PerOutput(fn([each.stacked() for each in some]))
    return PerOutput(tuple(fn(list(each)) for each in zip(*some, strict=True)))

"""Accumulation of slab products into a kernel, in few calls or chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.chunked_matmul import add_product, at_once, blocks, row_block_size
from ntkwatch.engines.machines import machine
from ntkwatch.engines.per_output import PerOutput


@dataclass
class Accumulator:
    """The kernel into which slabs of J are multiplied.

    For the kernel of a batch with itself (`same`), only the blocks on and below the diagonal are computed; `finish`
    mirrors them. Gradients shared by a weight and its bias are multiplied once. If memory is `short`, buffers stay
    small.
    """

    reduction: Reduction
    dtype: torch.dtype
    same: bool
    short: bool = False
    shared: dict[tuple[int, ...], tuple[PerOutput, PerOutput, Tensor]] = field(default_factory=dict)
    workspace: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)
    scale: float = 1.0  # choose buffers and rules for this many times the examples (`extrapolation`)

    def _scaled(self, n: int) -> int:
        return round(n * self.scale)

    def zeros(self, c: int, n: int, m: int, device: torch.device) -> Tensor:
        """A zero kernel: [n, m]; [C, n, m] for "blocks"; [C, n, C, m] for "full"."""
        shape = {"full": (c, n, c, m), "blocks": (c, n, m)}.get(self.reduction, (n, m))
        return torch.zeros(shape, dtype=self.dtype, device=device)

    @staticmethod
    def _by_example(out: Tensor) -> Tensor:
        """A zero "full" kernel [C, n, C, m], stored in memory as [n, C, m, C]."""
        c, n, _, m = out.shape
        return out.new_zeros(n, c, m, c).permute(1, 0, 3, 2)

    def finish(self, out: Tensor, outputs: int) -> Tensor:
        """Mirrors the kernel and divides "trace" and "sum" by the number of outputs; "full" returns [n, C, m, C]."""
        self._mirror(out)
        if self.reduction in ("trace", "sum"):
            return out.div_(outputs)
        return out.permute(1, 0, 3, 2) if self.reduction == "full" else out

    def _right(self, t: Tensor) -> Tensor:
        """The right factor of a product, computed from the left one; subclasses override it."""
        return t

    # ── the parts of a kernel ─────────────────────────────────────────────────────────────────────────────────────
    def _matrices(self, out: Tensor) -> Tensor:
        """The kernel as a stack of matrices [B, rows, columns]; "full" in its memory order."""
        if self.reduction == "full":
            return (out if out.is_contiguous() else out.permute(1, 0, 3, 2)).flatten(2).flatten(0, 1)[None]
        return out if self.reduction == "blocks" else out[None]

    def _mirror(self, out: Tensor) -> None:
        """Mirrors the lower block triangle."""
        if not self.same:
            return
        for matrix in self._matrices(out):
            for rows in blocks(len(matrix), row_block_size(matrix, self.same)):
                above = slice(0, rows.start)
                matrix[above, rows] = matrix[rows, above].T

    def _products(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """out += products of slabs [C, n, q] and [C, m, q] summed over q, in `dtype`, in chunks of terms."""
        matrices = self._matrices(out)
        if self.reduction == "full":
            x, y = ((t if out.is_contiguous() else t.transpose(0, 1)).flatten(0, 1)[None] for t in (x, y))
        y = self._right(y)
        if not machine(out.device).near:  # in few calls
            found = x @ y.transpose(1, 2) if self.dtype == torch.float64 else at_once(x, y)  # float64 needs no chunks
            matrices += found if len(found) == len(matrices) else found.sum(0, keepdim=True)
            return
        if self.reduction in ("trace", "sum"):
            matrices = matrices.expand(len(x), -1, -1)
        for matrix, a, b in zip(matrices, x, y, strict=True):
            add_product(matrix, a, b, self.same)

    def _cast(self, t: Tensor, key: int) -> Tensor:
        """`t` in `dtype`, in a reused buffer where the cast needs memory."""
        if t.dtype == self.dtype:
            return t
        return self._buffer(key, t.numel(), self.dtype, t.device).view(t.shape).copy_(t)

    def _buffer(self, key: int, entries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A reused buffer: allocating fresh pages costs as much as the products."""
        held = self.workspace.get((key, dtype))
        if held is None or len(held) < entries:
            held = self.workspace[key, dtype] = torch.empty(entries, dtype=dtype, device=device)
        return held[:entries]

    def _gradients(self, a: PerOutput, b: PerOutput) -> Tensor:
        """The kernel of C × [n, q] with C × [m, q]; the last result is cached."""
        key = (*a.place, *b.place)
        if key not in self.shared:
            out = self.zeros(len(a), a.shape[0], b.shape[0], a.device)
            x = self._side_by_side(a)
            self._products(out, x, x if self.same else self._side_by_side(b))
            self.shared = {key: (a, b, out)}  # holding a and b keeps others from reusing their memory
        return self.shared[key][2]

    def _side_by_side(self, g: PerOutput) -> Tensor:
        """C × [n, q] → [C, n, q], or [1, n, C·q] where outputs are summed: one wide product has fewer sums."""
        if self.reduction not in ("trace", "sum"):
            return g.stacked().to(self.dtype)
        beside = g.parts.transpose(0, 1) if isinstance(g.parts, Tensor) else torch.stack(g.parts, 1)
        return beside.flatten(1)[None].to(self.dtype)

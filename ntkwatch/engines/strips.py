"""Products of long rows: in stretches, and a symmetric one in strips of rows up to the diagonal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntkwatch.engines.machines import machine

STRETCH = 1 << 13  # terms of one product: no float32 sum grows longer
_NEAR = 1 << 20  # bytes of a stretch: strips find it in the cache (constants.py)
_SHORTEST = 512  # terms, below which a product is too short to be fast; of a multiple, so that rows stay aligned
_STRIP_ROWS = 40  # of a symmetric product, or a fifth of all: fewer would slow down what they save …
_NARROW = (12, 384)  # … but a CPU multiplies up to 12 rows of float32 fastest, as long as a stretch stays in the cache


def blocks(n: int, size: int) -> Iterator[slice]:
    """0 … n − 1 in pieces of `size`."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def strip_rows(matrix: Tensor, same: bool) -> int:
    """Rows of a strip, in which columns up to the diagonal are filled: all rows where nothing is mirrored."""
    n, at, (narrow, most) = len(matrix), machine(matrix.device), _NARROW
    if not same or at.strips == 1:
        return n
    if n <= most and matrix.dtype == torch.float32 and at.near:
        return -(-n // -(-n // narrow))  # of equal size, nearly
    return max(_STRIP_ROWS, n // 5)


def add_product(matrix: Tensor, a: Tensor, b: Tensor, same: bool) -> None:
    """matrix [n, m] += a [n, q] bᵀ [m, q]; where they are the `same`, up to the diagonal."""
    rows, columns = matrix.shape
    size, stretch = strip_rows(matrix, same), STRETCH
    if size < rows:
        stretch = min(STRETCH, max(1, _NEAR // (columns * a.element_size() * _SHORTEST)) * _SHORTEST)
    parts = [part[:, : (i + 1) * size] for i, part in enumerate(matrix.split(size))] if same else [matrix]
    for u, v in zip(a.split(stretch, 1), b.T.split(stretch), strict=True):
        for part, strip in zip(parts, u.split(size), strict=True):
            part.addmm_(strip, v.narrow(1, 0, part.shape[1]))


def at_once(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n, q] and [B, m, q] → [B, n, m] in few calls: the stretches are one batch, and float64 needs none."""
    whole = x.shape[2] // STRETCH * STRETCH
    if dtype == torch.float64 or whole <= STRETCH:
        return x @ y.transpose(1, 2)
    u, v = (t[..., :whole].unflatten(2, (-1, STRETCH)).transpose(1, 2) for t in (x, y))
    found = (u @ v.transpose(2, 3)).sum(1)
    return found if whole == x.shape[2] else found.baddbmm_(x[..., whole:], y[..., whole:].transpose(1, 2))

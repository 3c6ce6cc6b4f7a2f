"""Products of long rows: in stretches, and a symmetric one in strips of rows up to the diagonal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntkwatch.engines.machines import machine

STRETCH = 1 << 13  # terms of one product: no float32 sum grows longer
_FEW = 24  # rows, of which the stretches are multiplied fastest as one batch …
_STRIPS = ((256, 4), (96, 2))  # … and from how many on a symmetric product is worth cutting, and into how many strips


def blocks(n: int, size: int) -> Iterator[slice]:
    """0 … n − 1 in pieces of `size`."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def strip_rows(matrix: Tensor, same: bool) -> int:
    """Rows of a strip, in which columns up to the diagonal are filled: all rows where nothing is mirrored."""
    return -(-len(matrix) // strip_count(len(matrix), same, matrix.device))


def strip_count(n: int, same: bool, device: torch.device) -> int:
    """Into how many strips a product of n rows is cut."""
    if not same or machine(device).strips == 1:
        return 1
    return next((strips for rows, strips in _STRIPS if n >= rows), 1)


def add_product(matrix: Tensor, a: Tensor, b: Tensor, same: bool) -> None:
    """matrix [n, m] += a [n, q] bᵀ [m, q]; where they are the `same`, up to the diagonal."""
    if len(matrix) <= _FEW and a.shape[1] > STRETCH:
        matrix += at_once(a[None], b[None])[0]
        return
    size = strip_rows(matrix, same)
    parts = [part[:, : (i + 1) * size] for i, part in enumerate(matrix.split(size))] if same else [matrix]
    for u, v in zip(a.split(STRETCH, 1), b.T.split(STRETCH), strict=True):
        for part, strip in zip(parts, u.split(size), strict=True):
            part.addmm_(strip, v.narrow(1, 0, part.shape[1]))


def at_once(x: Tensor, y: Tensor) -> Tensor:
    """[B, n, q] and [B, m, q] → [B, n, m] in few calls: the stretches are one batch."""
    whole = x.shape[2] // STRETCH * STRETCH
    if whole <= STRETCH:
        return x @ y.transpose(1, 2)
    u, v = (t[..., :whole].unflatten(2, (-1, STRETCH)).transpose(1, 2) for t in (x, y))
    found = (u @ v.transpose(2, 3)).sum(1)
    return found if whole == x.shape[2] else found.baddbmm_(x[..., whole:], y[..., whole:].transpose(1, 2))

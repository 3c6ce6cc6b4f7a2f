"""Matmul accumulated in chunks of 8,192 terms (bounds float32 error); A Aᵀ fills the lower block triangle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntkwatch.engines.machines import machine

CHUNK = 1 << 13  # terms of one float32 sum
_FEW = 24  # rows up to which one batched product of all chunks is fastest
_ROW_BLOCKS = ((256, 4), (96, 2))  # (rows, blocks): a symmetric product of so many rows is cut into so many blocks


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of 0 … n − 1 of at most `size`."""
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def row_block_size(matrix: Tensor, same: bool) -> int:
    """Rows per block of the lower triangle; all rows where the product is not symmetric."""
    return -(-len(matrix) // count_row_blocks(len(matrix), same, matrix.device))


def count_row_blocks(n: int, same: bool, device: torch.device) -> int:
    """Row blocks of a product of n rows."""
    if not same or machine(device).row_blocks == 1:
        return 1
    return next((count for rows, count in _ROW_BLOCKS if n >= rows), 1)


def add_product(matrix: Tensor, a: Tensor, b: Tensor, same: bool) -> None:
    """matrix [n, m] += a [n, q] bᵀ [m, q]; with `same`, its lower block triangle only."""
    if len(matrix) <= _FEW and a.shape[1] > CHUNK:
        matrix += at_once(a[None], b[None])[0]
        return
    size = row_block_size(matrix, same)
    parts = [part[:, : (i + 1) * size] for i, part in enumerate(matrix.split(size))] if same else [matrix]
    for u, v in zip(a.split(CHUNK, 1), b.T.split(CHUNK), strict=True):
        for part, rows in zip(parts, u.split(size), strict=True):
            part.addmm_(rows, v.narrow(1, 0, part.shape[1]))


def at_once(x: Tensor, y: Tensor) -> Tensor:
    """[B, n, q] and [B, m, q] → [B, n, m], with all chunks in one batched product."""
    whole = x.shape[2] // CHUNK * CHUNK
    if whole <= CHUNK:
        return x @ y.transpose(1, 2)
    u, v = (t[..., :whole].unflatten(2, (-1, CHUNK)).transpose(1, 2) for t in (x, y))
    found = (u @ v.transpose(2, 3)).sum(1)
    return found if whole == x.shape[2] else found.baddbmm_(x[..., whole:], y[..., whole:].transpose(1, 2))

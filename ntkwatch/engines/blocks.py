"""Blocks of probes, and the assembly of kernels from the kernels of pairs of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ntkwatch.model import batch_size, inputs_of, take

COLUMNS: dict[str, int] = {"trace": 1, "sum": 1, "blocks": 2, "full": 2}
ROWS: dict[str, int] = {"trace": 0, "sum": 0, "blocks": 1, "full": 0}


def blocks(x: Any, chunk: int) -> list[Any]:
    """The batch in blocks of at most `chunk` probes."""
    n = batch_size(inputs_of(x))
    return [x] if chunk >= n else [take(x, slice(i, i + chunk)) for i in range(0, n, chunk)]


def transpose(kernel: Tensor, reduction: str) -> Tensor:
    """The kernel with its two sides exchanged."""
    return kernel.permute(2, 3, 0, 1) if reduction == "full" else kernel.transpose(-1, -2)


def assemble(
    sizes1: Sequence[int],
    sizes2: Sequence[int] | None,
    cell: Callable[[int, int], dict[str, Tensor]],
    reduction_of: Callable[[str], str],
) -> dict[str, Tensor]:
    """Kernels by name from their cells; `sizes2` None: symmetric, from the cells on and below the diagonal."""
    whole: dict[str, Tensor] = {}
    starts1, starts2 = _starts(sizes1), _starts(sizes1 if sizes2 is None else sizes2)
    for i in range(len(sizes1)):
        for j in range(i + 1 if sizes2 is None else len(starts2) - 1):
            for name, part in cell(i, j).items():
                reduction = reduction_of(name)
                if name not in whole:
                    shape = list(part.shape)
                    shape[ROWS[reduction]], shape[COLUMNS[reduction]] = starts1[-1], starts2[-1]
                    if shape == list(part.shape):
                        whole[name] = part
                        continue
                    whole[name] = part.new_zeros(shape)
                _put(whole[name], part, reduction, starts1[i], starts2[j])
                if sizes2 is None and i != j:
                    _put(whole[name], transpose(part, reduction), reduction, starts2[j], starts1[i])
    return whole


def _starts(sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(sizes, initial=0))


def _put(whole: Tensor, part: Tensor, reduction: str, row: int, column: int) -> None:
    rows, columns = ROWS[reduction], COLUMNS[reduction]
    whole.narrow(rows, row, part.shape[rows]).narrow(columns, column, part.shape[columns]).copy_(part)

"""The cost of a contraction, in arithmetic and memory traffic, and the cheapest contraction for a factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.chunked_matmul import CHUNK, count_row_blocks
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows
from ntkwatch.engines.machines import Machine, machine

FEW = 0.3  # share of the full rate that many C × C products of long rows reach
_CALLS_OF_PAIR = 8  # operations per pair of blocks of examples, besides those per output
_CALLS_OF_EXAMPLE = 12  # operations per example with all others, in a full kernel
_CALLS_OF_SLAB = 8  # operations per slab of J


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    seconds: float


def skinny(rows: int, dtype: torch.dtype) -> float:
    """The share of the full rate that a Gram of few rows reaches: each operand is read for few products."""
    return min(1.0, (0.4 if dtype == torch.float64 else 0.6) + rows / 400)


def gram_rows(one: Factor, n: int, pairs: int, symmetric: bool) -> int:
    """Examples per block of pairs, where a pair of examples has `pairs` entries."""
    at = machine(one.device)
    return max(1, min(int((at.pairs / pairs) ** 0.5), -(-n // at.row_blocks) if symmetric else n))


def full_rows(two: Outer | Rows) -> int:
    """Examples that are multiplied with one example at a time, for all pairs of outputs."""
    return max(1, machine(two.device).pairs // (two.outputs * two.groups * two.positions * two.q))


def products(at: Machine, dtype: torch.dtype, count: float, rows: float, terms: float, columns: float) -> float:
    """Seconds of `count` products of [rows, terms] with [terms, columns]; padding models the slower small products."""
    return 2 * count * (rows + at.pad) * (terms + at.pad) * (columns + at.pad) / (at.many * at.flops(dtype))


def gram_cost(one: Outer | Rows, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Grams of inputs times Grams of output gradients, for n × m examples and all pairs of positions."""
    s, c, groups, p, q, at = one.positions, one.outputs, one.groups, one.p, one.q, machine(one.device)
    if reduction == "full" and s * groups > 1:
        return _full_cost(one, n, m, dtype, same)
    grams = {"trace": 1, "sum": 1, "blocks": c, "full": c * c}[reduction]
    size = gram_rows(one, n, s * s * groups, same) if s > 1 else n
    count = -(-n // size) * -(-m // size)  # pairs of blocks
    half = (1 + size / n) / 2 if s > 1 and same else 1.0
    if s == 1:
        half = _in_strips(n * (c if reduction == "full" else 1), same, one)
    pairs = float(n * m) * s * s * groups * half
    times = -(-m // size) * half if at.near else 1.0  # reads of a block's gradients
    read = (n + m) * s * groups * (p + c * q * times) * (one.dtype.itemsize + dtype.itemsize)
    moved = read + pairs * (2 * (1 + grams) + (0 if s == 1 else 4 * grams)) * dtype.itemsize
    each = c if reduction == "trace" else grams
    lined_up = -(-c * q // CHUNK) if one.g.together and reduction in ("trace", "sum") else c  # products per pair
    calls = half * count * (_CALLS_OF_PAIR + 2 * lined_up) if s > 1 and at.near else 0.0
    width = min(n, size) * s
    time = products(at, dtype, half * count * groups, width, p, min(m, size) * s)
    time += products(at, dtype, half * count * groups * lined_up, width, each * q / lined_up, min(m, size) * s)
    return Cost(2 * pairs * (p + q * each), moved, time + moved / at.bandwidth + calls * at.call)


def _in_strips(width: int, same: bool, one: Factor) -> float:
    """The computed share of a product with `width` rows: row blocks up to the diagonal."""
    return (1 + 1 / count_row_blocks(width, same, one.device)) / 2


def _full_cost(one: Outer | Rows, n: int, m: int, dtype: torch.dtype, same: bool) -> Cost:
    """The "full" kernel of n × m examples: gradients weighted by input products, then products for all output pairs."""
    s, c, groups, p, q, at = one.positions, one.outputs, one.groups, one.p, one.q, machine(one.device)
    half = (1 + 1 / n) / 2 if same and at.near else 1.0
    calls = n * (2 * c + _CALLS_OF_EXAMPLE) if at.near else 12 * -(-n * m // full_rows(one))
    pairs, sums = half * n * m * s * s * groups, half * n * m * s * groups * c * q
    weighing, paired = 2 * pairs * (p + c * q), 2 * sums * c
    moved = (2 * (n + m) * s * groups * (p + c * q) + 2 * pairs + 3 * sums) * dtype.itemsize
    time = products(at, dtype, half * n * groups, s, p, m * s) + products(at, dtype, half * n * groups * c, m * s, s, q)
    seconds = time + paired / FEW / at.flops(dtype) + moved / at.bandwidth + calls * at.call
    return Cost(weighing + paired, moved, seconds)


def jacobian_cost(one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Per-example Jacobians of n examples (n + m unless `same`), then their Gram."""
    c, entries, at = one.outputs, one.leading * one.trailing, machine(one.device)
    rows = n if same else n + m
    pairs = {"trace": c, "blocks": c, "sum": 1, "full": c * c}[reduction]
    moved = float(rows * c * entries) * (one.dtype.itemsize + (dtype.itemsize if dtype != one.dtype else 0))
    gram = 2.0 * n * m * pairs * entries
    width = min(n, m) * (c if reduction == "full" else 1)
    if isinstance(one, Dense):  # other factors: calibrated with whole products
        gram *= _in_strips(width, same, one)
    made, time = 0.0, gram / (skinny(width, dtype) * at.flops(dtype))
    if isinstance(one, Outer):
        made = 2.0 * rows * c * entries * one.positions
        read = rows * one.groups * one.positions * (2 * one.p + c * one.q) * one.dtype.itemsize
        moved += read if at.near else 0.0  # the choices on GPUs were calibrated without it
        time += products(at, one.dtype, rows * c * one.groups, one.q, one.positions, one.p)
    return Cost(made + gram, moved, time + moved / at.bandwidth + _slab_calls(one, n, m, reduction) * at.call)


def _slab_calls(one: Factor, n: int, m: int, reduction: Reduction) -> float:
    """Operations on the slabs of J, one set per output unless one product covers all outputs."""
    if isinstance(one, Dense) or not machine(one.device).near:
        return 0.0
    held = one.outputs if reduction == "full" else 1
    slabs = -(-one.leading * max(n, m) * one.trailing * held // machine(one.device).slab)
    return slabs * (_CALLS_OF_SLAB + (2 if reduction == "full" else _CALLS_OF_SLAB) * one.outputs)


def choose(
    one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True
) -> tuple[str, Cost]:
    """The cheaper of "gram" and "jacobian", and its cost for n × m examples; `same`: of a batch with itself."""
    direct = jacobian_cost(one, n, m, reduction, dtype, same)
    if isinstance(one, Outer | Rows):
        gram = gram_cost(one, n, m, reduction, dtype, same)
        if gram.seconds < direct.seconds:
            return "gram", gram
    return "jacobian", direct

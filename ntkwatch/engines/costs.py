"""What a contraction costs, in arithmetic and in memory traffic, and the cheapest one for a factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows
from ntkwatch.engines.machines import machine
from ntkwatch.engines.strips import strip_count

FEW = 0.3  # of the full rate: the share that many products of C × C of long rows reach


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    seconds: float


def skinny(rows: int, dtype: torch.dtype) -> float:
    """The share of the full rate that a Gram of few rows reaches: its operands are read for few products each."""
    return min(1.0, (0.4 if dtype == torch.float64 else 0.6) + rows / 400)


def gram_rows(one: Factor, n: int, pairs: int, symmetric: bool) -> int:
    """Examples per block of pairs, when a pair of examples has `pairs` entries."""
    at = machine(one.device)
    return max(1, min(int((at.pairs / pairs) ** 0.5), -(-n // at.strips) if symmetric else n))


def full_rows(two: Outer | Rows) -> int:
    """Examples that one is multiplied with at a time, for all pairs of outputs."""
    return max(1, machine(two.device).pairs // (two.outputs * two.groups * two.positions * two.q))


def gram_cost(one: Outer | Rows, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Products of inputs times products of output gradients, for n × m examples and all pairs of positions."""
    s, c, groups = one.positions, one.outputs, one.groups
    p, q = one.p, one.q
    if reduction == "full" and s * groups > 1:
        return _full_cost(one, n, m, dtype, same)
    grams = {"trace": 1, "sum": 1, "blocks": c, "full": c * c}[reduction]
    half = _in_strips(n * (c if reduction == "full" else 1), same, one)
    if s > 1:
        half = (1 + gram_rows(one, n, s * s * groups, same) / n) / 2 if same else 1.0
    pairs = float(n * m) * s * s * groups * half
    cast = (n + m) * s * groups * (p + c * q) * (one.dtype.itemsize + dtype.itemsize)
    passes = 2 * (1 + grams) + (0 if s == 1 else 4 * grams)
    flops = 2 * pairs * (p + q * (c if reduction == "trace" else grams))
    moved = cast + pairs * passes * dtype.itemsize
    at = machine(one.device)
    return Cost(flops, moved, flops / (at.many * at.flops(dtype)) + moved / at.bandwidth)


def _in_strips(width: int, same: bool, one: Factor) -> float:
    """The share of a product of that many rows that is taken, in strips up to the diagonal."""
    return (1 + 1 / strip_count(width, same, one.device)) / 2


def _full_cost(one: Outer | Rows, n: int, m: int, dtype: torch.dtype, same: bool) -> Cost:
    """Gradients weighted by products of inputs, for n × m examples, then their products for all pairs of outputs."""
    s, c, groups, q, at = one.positions, one.outputs, one.groups, one.q, machine(one.device)
    half = (1 + 1 / n) / 2 if same and at.near else 1.0
    calls = n * (c + 8) if at.near else 12 * -(-n * m // full_rows(one))
    pairs, sums = half * n * m * s * s * groups, half * n * m * s * groups * c * q
    weighing, products = 2 * pairs * (one.p + c * q), 2 * sums * c
    moved = (2 * (n + m) * s * groups * (one.p + c * q) + 2 * pairs + 3 * sums) * dtype.itemsize
    seconds = (weighing / at.many + products / FEW) / at.flops(dtype) + moved / at.bandwidth + calls * at.call
    return Cost(weighing + products, moved, seconds)


def jacobian_cost(one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Per-example Jacobians of n (and, if others, m) examples, then their Gram."""
    c, entries = one.outputs, one.leading * one.trailing
    rows = n if same else n + m
    made = 2.0 * rows * c * entries * one.positions if isinstance(one, Outer) else 0.0
    pairs = {"trace": c, "blocks": c, "sum": 1, "full": c * c}[reduction]
    moved = float(rows * c * entries) * (one.dtype.itemsize + (dtype.itemsize if dtype != one.dtype else 0))
    gram = 2.0 * n * m * pairs * entries
    width = min(n, m) * (c if reduction == "full" else 1)
    if isinstance(one, Dense):  # nothing is chosen for it; of the others, choices were measured against whole products
        gram *= _in_strips(width, same, one)
    at = machine(one.device)
    products = made / (at.many * at.flops(one.dtype)) + gram / (skinny(width, dtype) * at.flops(dtype))
    return Cost(made + gram, moved, products + moved / at.bandwidth)


def choose(
    one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True
) -> tuple[str, Cost]:
    """ "gram" or "jacobian" and what it costs for n × m examples; `same`: of a batch with itself."""
    direct = jacobian_cost(one, n, m, reduction, dtype, same)
    if isinstance(one, Outer | Rows):
        gram = gram_cost(one, n, m, reduction, dtype, same)
        if gram.seconds < direct.seconds:
            return "gram", gram
    return "jacobian", direct

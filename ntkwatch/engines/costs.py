"""What a contraction costs, in arithmetic and in memory traffic, and the cheapest one for a factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.factors import Factor, Outer, Rows

# Measured on one CPU core by `python tests/bench/constants.py`: operations per second of large matrix products, and
# bytes per second of traffic. Only their ratios decide, and they are the same on two cores. They are committed, not
# measured at run time: a choice that depended on the load would change the last bits of K from run to run.
FLOPS = {torch.float32: 1.8e11, torch.float64: 9e10, torch.bfloat16: 1.8e11, torch.float16: 1.8e11}  # halves: float32
BANDWIDTH = 1.3e10
MANY = 0.8  # the share of the full rate that many products of moderate size reach
STRIPS = 8  # of a symmetric product, whose upper blocks are left out
PAIRS = 1 << 23  # entries of a block of pairs of positions


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    seconds: float


def skinny(rows: int, dtype: torch.dtype) -> float:
    """The share of the full rate that a Gram of few rows reaches: its operands are read for few products each."""
    return min(1.0, (0.4 if dtype == torch.float64 else 0.6) + rows / 400)


def gram_rows(n: int, pairs: int, symmetric: bool) -> int:
    """Examples per block of pairs, when a pair of examples has `pairs` entries."""
    return max(1, min(int((PAIRS / pairs) ** 0.5), -(-n // STRIPS) if symmetric else n))


def gram_cost(one: Outer | Rows, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Products of inputs times products of output gradients, for n × m examples and all pairs of positions."""
    s, c, groups = one.positions, one.outputs, one.groups
    p, q = one.p, one.q
    grams = {"trace": 1, "sum": 1, "blocks": c, "full": c * c}[reduction]
    size = gram_rows(n, s * s * groups * (grams if reduction == "full" else 1), same)
    half = (1 + size / n) / 2 if same and s > 1 else 1.0
    pairs = float(n * m) * s * s * groups * half
    cast = (n + m) * s * groups * (p + c * q) * (one.dtype.itemsize + dtype.itemsize)
    passes = 2 * (1 + grams) + (0 if s == 1 else 4 * grams)
    flops = 2 * pairs * (p + q * (c if reduction == "trace" else grams))
    moved = cast + pairs * passes * dtype.itemsize
    return Cost(flops, moved, flops / (MANY * FLOPS[dtype]) + moved / BANDWIDTH)


def jacobian_cost(one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype, same: bool = True) -> Cost:
    """Per-example Jacobians of n (and, if others, m) examples, then their Gram."""
    c, entries = one.outputs, one.leading * one.trailing
    rows = n if same else n + m
    made = 2.0 * rows * c * entries * one.positions if isinstance(one, Outer) else 0.0
    pairs = {"trace": c, "blocks": c, "sum": 1, "full": c * c}[reduction]
    moved = float(rows * c * entries) * (one.dtype.itemsize + (dtype.itemsize if dtype != one.dtype else 0))
    gram = 2.0 * n * m * pairs * entries
    width = min(n, m) * (c if reduction == "full" else 1)
    seconds = made / (MANY * FLOPS[one.dtype]) + gram / (skinny(width, dtype) * FLOPS[dtype]) + moved / BANDWIDTH
    return Cost(made + gram, moved, seconds)


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

"""What a contraction costs, in arithmetic and in memory traffic, and the cheapest one for a factor."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.factors import Factor, Outer, Rows


@dataclass(frozen=True)
class Machine:
    """What a kind of device does in a second, and in what portions it works best.

    Attributes:
        single: operations of large matrix products in float32.
        double: the same in float64.
        bandwidth: bytes of traffic.
        many: the share of the full rate that many products of moderate size reach.
        call: seconds that an operation takes however little it does.
        pairs: entries of a block of pairs of positions.
        slab: entries of a slab of J, which is cast and multiplied while it is near.
        strips: of a symmetric product, whose upper blocks are left out; one where calls cost more than they save.
        near: whether memory that was just written is much faster to read, so that small portions pay.
    """

    single: float
    double: float
    bandwidth: float
    many: float
    call: float
    pairs: int
    slab: int
    strips: int
    near: bool

    def flops(self, dtype: torch.dtype) -> float:
        """Operations per second; factors in half precision are multiplied in float32."""
        return self.double if dtype == torch.float64 else self.single


# Measured by `python tests/bench/constants.py [--device cuda]`, on one CPU core and on an H100. Only ratios decide, and
# they are the same on two cores. They are committed, not measured at run time: a choice that depended on the load would
# change the last bits of K from run to run.
MACHINES = {
    "cpu": Machine(1.8e11, 9e10, 1.3e10, 0.8, 5e-6, pairs=1 << 23, slab=1 << 21, strips=8, near=True),
    "cuda": Machine(4.8e13, 5.5e13, 2.6e12, 0.4, 1e-5, pairs=1 << 26, slab=1 << 24, strips=1, near=False),
}
FEW = 0.3  # of the full rate: the share that many products of C × C of long rows reach
_FULL_DOUBLE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # of NVIDIA's: those made for computing centres …
_SLOW_DOUBLE = 64  # … and how much slower float64 is on all others


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    seconds: float


def machine(device: torch.device) -> Machine:
    """What is known of a kind of device; of a GPU's float64, by what its maker says of it."""
    known = MACHINES.get(device.type, MACHINES["cuda"])
    return known if has_fast_double(device) else replace(known, double=known.single / _SLOW_DOUBLE)


@functools.cache
def has_fast_double(device: torch.device) -> bool:
    """Whether float64 products take no more than a few times as long as float32 ones."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return device.type in ("cpu", "cuda")
    return torch.cuda.get_device_capability(device) in _FULL_DOUBLE


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
    size = gram_rows(one, n, s * s * groups, same)
    half = (1 + size / n) / 2 if same and s > 1 else 1.0
    pairs = float(n * m) * s * s * groups * half
    cast = (n + m) * s * groups * (p + c * q) * (one.dtype.itemsize + dtype.itemsize)
    passes = 2 * (1 + grams) + (0 if s == 1 else 4 * grams)
    flops = 2 * pairs * (p + q * (c if reduction == "trace" else grams))
    moved = cast + pairs * passes * dtype.itemsize
    at = machine(one.device)
    return Cost(flops, moved, flops / (at.many * at.flops(dtype)) + moved / at.bandwidth)


def _full_cost(one: Outer | Rows, n: int, m: int, dtype: torch.dtype, same: bool) -> Cost:
    """Gradients weighted by products of inputs, for n × m examples, then their products for all pairs of outputs."""
    s, c, groups, q, at = one.positions, one.outputs, one.groups, one.q, machine(one.device)
    half = (1 + 1 / n) / 2 if same else 1.0
    pairs, sums = half * n * m * s * s * groups, half * n * m * s * groups * c * q
    weighing, products = 2 * pairs * (one.p + c * q), 2 * sums * c
    moved = (2 * (n + m) * s * groups * (one.p + c * q) + 2 * pairs + 3 * sums) * dtype.itemsize
    seconds = (weighing / at.many + products / FEW) / at.flops(dtype) + moved / at.bandwidth + n * (c + 8) * at.call
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

"""Factors → kernel, by the cheapest exact contraction of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows

# Measured on two CPU cores by tests/bench: operations per second of matrix products, and bytes per second of traffic.
FLOPS = {torch.float32: 1.6e11, torch.float64: 8e10}
BANDWIDTH = 1.0e10
_BLOCK = 1 << 25  # entries of one intermediate


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    dtype: torch.dtype

    @property
    def seconds(self) -> float:
        return self.flops / FLOPS[self.dtype] + self.bytes / BANDWIDTH


def gram_cost(one: Outer | Rows, m: int, reduction: Reduction, dtype: torch.dtype) -> Cost:
    """Products of inputs times products of output gradients, for n × m examples and all pairs of positions."""
    n, s, c = one.n, one.positions, one.outputs
    groups, p = (one.a.shape[1], one.a.shape[3]) if isinstance(one, Outer) else (1, 1)
    pairs = n * m * s * s * groups
    q = one.g.shape[-1]
    grams = {"trace": 1, "sum": 1, "blocks": c, "full": c * c}[reduction]
    arithmetic = 2 * pairs * (p + q * (c if reduction == "trace" else grams))
    size = dtype.itemsize
    return Cost(arithmetic, pairs * size * (2 + 3 * grams) + size * 2 * c * (n + m) * s * q * groups, dtype)


def jacobian_cost(one: Factor, m: int, reduction: Reduction, dtype: torch.dtype, factor: torch.dtype) -> Cost:
    """Per-example Jacobians of n and m examples, then their Gram."""
    n, c = one.n, one.outputs
    entries = one.entries  # type: ignore[attr-defined]
    make = 2 * (n + m) * c * entries * one.positions if isinstance(one, Outer) else 0
    pairs = {"trace": c, "blocks": c, "sum": 1, "full": c * c}[reduction]
    ratio = FLOPS[dtype] / FLOPS.get(factor, FLOPS[torch.float32])
    moved = (n + m) * c * entries * (2 * factor.itemsize + 2 * dtype.itemsize)
    return Cost(make * ratio + 2 * n * m * pairs * entries, moved, dtype)


def choose(one: Factor, m: int, reduction: Reduction, dtype: torch.dtype) -> tuple[str, Cost]:
    """ "gram" or "jacobian" and what it costs."""
    factor = one.g.dtype if isinstance(one, Outer | Rows) else dtype
    direct = jacobian_cost(one, m, reduction, dtype, factor)
    if isinstance(one, Outer | Rows):
        gram = gram_cost(one, m, reduction, dtype)
        if gram.seconds < direct.seconds:
            return "gram", gram
    return "jacobian", direct


def contract(one: Factor, two: Factor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """The kernel of two factors of one parameter: [n, m], [C, n, m] or [n, C, m, C]; "trace" means over C."""
    if isinstance(one, Outer | Rows) and type(one) is type(two) and choose(one, two.n, reduction, dtype)[0] == "gram":
        return _gram(one, two, reduction, dtype)
    return _by_jacobian(one, two, reduction, dtype)


def _blocks(n: int, per_row: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(per_row, 1))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _by_jacobian(one: Factor, two: Factor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    entries, c = one.entries, one.outputs  # type: ignore[attr-defined]
    n, m = one.n, two.n
    k = torch.zeros(c, n, c, m, dtype=dtype) if reduction == "full" else torch.zeros(c, n, m, dtype=dtype)
    k = k.to(_device(one))
    held = c if reduction == "full" else 1
    for rows in _blocks(n, entries * held):
        for columns in _blocks(m, entries * held):
            same = one is two and rows == columns
            if one is two and columns.start > rows.start:
                continue
            if reduction == "full":
                a = torch.stack([one.jacobian(rows, i) for i in range(c)]).flatten(0, 1)
                b = a if same else torch.stack([two.jacobian(columns, i) for i in range(c)]).flatten(0, 1)
                part = _product(a, b, dtype).unflatten(0, (c, -1)).unflatten(2, (c, -1))
                k[:, rows, :, columns] = part
                if one is two and not same:
                    k[:, columns, :, rows] = part.permute(2, 3, 0, 1)
                continue
            for i in range(c):
                a = one.jacobian(rows, i)
                part = _product(a, a if same else two.jacobian(columns, i), dtype)
                k[i, rows, columns] = part
                if one is two and not same:
                    k[i, columns, rows] = part.T
    return _finish(k, reduction)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, width: int = 1 << 14) -> Tensor:
    """a bᵀ in `dtype`, cast and summed a stretch at a time: no float32 sum grows long, and the casts stay in cache."""
    out = torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)
    for start in range(0, a.shape[1], width):
        x = a[:, start : start + width].to(dtype)
        y = x if b is a else b[:, start : start + width].to(dtype)
        out.addmm_(x, y.T)
    return out


def _gram(one: Outer | Rows, two: Outer | Rows, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Σ_ss' ⟨a_s, a_s'⟩⟨g_s, g_s'⟩ summed over groups."""
    n, m, c, s = one.n, two.n, one.outputs, one.positions
    groups = one.a.shape[1] if isinstance(one, Outer) else 1
    t = two.positions
    grams = {"trace": 1, "sum": 1, "blocks": 1, "full": c * c}[reduction]
    k = torch.zeros(_shape(reduction, n, m, c), dtype=dtype, device=one.g.device)
    for rows in _blocks(n, m * s * t * groups * grams):
        inputs = _input_products(one, two, rows, dtype)  # [G, b·s, m·t]
        a, b = _gradients(one, rows, dtype), _gradients(two, slice(None), dtype)  # [C, G, b·s, q]
        if reduction in ("trace", "sum"):
            joined = [x.permute(1, 2, 0, 3).flatten(2) for x in (a, b)]
            products = joined[0] @ joined[1].transpose(-1, -2)
            k[rows] = _positions(inputs, products, s, t)
        elif reduction == "blocks":
            for i in range(c):
                k[i, rows] = _positions(inputs, a[i] @ b[i].transpose(-1, -2), s, t)
        else:
            products = a.transpose(0, 1).flatten(1, 2) @ b.transpose(0, 1).flatten(1, 2).transpose(-1, -2)
            k[:, rows] = _full_positions(inputs, products, c, s, t)
    return k / c if reduction == "trace" else (k.transpose(0, 1) if reduction == "full" else k)


def _shape(reduction: Reduction, n: int, m: int, c: int) -> tuple[int, ...]:
    return {"trace": (n, m), "sum": (n, m), "blocks": (c, n, m), "full": (c, n, m, c)}[reduction]


def _input_products(one: Outer | Rows, two: Outer | Rows, rows: slice, dtype: torch.dtype) -> Tensor:
    if isinstance(one, Rows):
        assert isinstance(two, Rows)
        same = one.index[rows].reshape(-1, 1) == two.index.reshape(1, -1)
        return same.to(dtype)[None]
    assert isinstance(two, Outer)
    a, b = (f.a(r).to(dtype).transpose(0, 1).flatten(1, 2) for f, r in ((one, rows), (two, slice(None))))
    return a @ b.transpose(-1, -2)


def _gradients(one: Outer | Rows, rows: slice, dtype: torch.dtype) -> Tensor:
    g = one.g[:, rows] if isinstance(one, Outer) else one.g[:, rows, None]
    return g.to(dtype).transpose(1, 2).flatten(2, 3)


def _positions(inputs: Tensor, products: Tensor, s: int, t: int) -> Tensor:
    """[G, b·s, m·t] twice → [b, m]."""
    if s == t == 1 and len(inputs) == 1:
        return inputs[0] * products[0]
    return (inputs * products).sum(0).unflatten(0, (-1, s)).unflatten(2, (-1, t)).sum((1, 3))


def _full_positions(inputs: Tensor, products: Tensor, c: int, s: int, t: int) -> Tensor:
    """[G, b·s, m·t] and [G, c·b·s, c·m·t] → [c, b, m, c]."""
    groups = len(inputs)
    p = products.reshape(groups, c, -1, s, c, inputs.shape[2] // t, t)
    i = inputs.reshape(groups, 1, -1, s, 1, inputs.shape[2] // t, t)
    return (p * i).sum((0, 3, 6)).permute(0, 1, 3, 2)


def _finish(k: Tensor, reduction: Reduction) -> Tensor:
    """[C, n, m] or [C, n, C, m] → the reduction."""
    if reduction == "full":
        return k.permute(1, 0, 3, 2)
    if reduction == "blocks":
        return k
    return k.mean(0) if reduction == "trace" else k[0]


def _device(one: Factor) -> torch.device:
    if isinstance(one, Outer | Rows):
        return one.g.device
    if isinstance(one, Dense):
        return one.j.device
    return _device(one.parts[0])  # type: ignore[attr-defined]

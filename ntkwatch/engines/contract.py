"""Factors → kernel, by the cheapest exact contraction of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ntkwatch.engines.base import Reduction
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows, aligned

# Measured on one CPU core by tests/bench: operations per second of matrix products, and bytes per second of traffic.
# Only their ratios decide, and they are the same on two cores.
FLOPS = {torch.float32: 9e10, torch.float64: 4.5e10, torch.bfloat16: 9e10, torch.float16: 9e10}  # halves: as float32
BANDWIDTH = 6e9
_SLAB = 1 << 20  # entries of a slab of J: it is cast and multiplied while it is still in cache
_SLAB_ROWS = 64  # … but of no fewer rows, below which matrix products slow down
_SLAB_MOST = 1 << 25
_PAIRS = 1 << 23  # entries of a block of pairs of positions
_STRETCH = 1 << 13  # terms of one product: no float32 sum grows longer
_STRIPS = 4  # of a symmetric product, whose upper blocks are left out


@dataclass(frozen=True)
class Cost:
    """Arithmetic and traffic of one contraction, and the seconds they predict."""

    flops: float
    bytes: float
    seconds: float


def _cost(made: float, factor: torch.dtype, multiplied: float, dtype: torch.dtype, moved: float) -> Cost:
    seconds = made / FLOPS[factor] + multiplied / FLOPS[dtype] + moved / BANDWIDTH
    return Cost(made + multiplied, moved, seconds)


def gram_cost(one: Outer | Rows, n: int, m: int, reduction: Reduction, dtype: torch.dtype) -> Cost:
    """Products of inputs times products of output gradients, for n × m examples and all pairs of positions."""
    s, c, groups = one.positions, one.outputs, one.groups
    p, q = (one.a.shape[3] if isinstance(one, Outer) else 1), one.g.shape[-1]
    pairs = float(n * m) * s * s * groups
    grams = {"trace": 1, "sum": 1, "blocks": c, "full": c * c}[reduction]
    cast = (n + m) * s * groups * (p + c * q) * (one.dtype.itemsize + dtype.itemsize)
    passes = 2 * (1 + grams) + (0 if s == 1 else 4 * grams)
    arithmetic = 2 * pairs * (p + q * (c if reduction == "trace" else grams))
    return _cost(0, one.dtype, arithmetic, dtype, cast + pairs * passes * dtype.itemsize)


def jacobian_cost(one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype) -> Cost:
    """Per-example Jacobians of n (and, if others, m) examples, then their Gram."""
    c, entries = one.outputs, one.leading * one.trailing
    rows = n if m == n else n + m
    make = 2.0 * rows * c * entries * one.positions if isinstance(one, Outer) else 0.0
    pairs = {"trace": c, "blocks": c, "sum": 1, "full": c * c}[reduction]
    moved = 2.0 * rows * c * entries * (one.dtype.itemsize + dtype.itemsize)
    return _cost(make, one.dtype, 2.0 * n * m * pairs * entries, dtype, moved)


def choose(one: Factor, n: int, m: int, reduction: Reduction, dtype: torch.dtype) -> tuple[str, Cost]:
    """ "gram" or "jacobian" and what it costs for n × m examples."""
    direct = jacobian_cost(one, n, m, reduction, dtype)
    if isinstance(one, Outer | Rows):
        gram = gram_cost(one, n, m, reduction, dtype)
        if gram.seconds < direct.seconds:
            return "gram", gram
    return "jacobian", direct


@dataclass
class Contractor:
    """Contracts pairs of factors; products of gradients that a weight and its bias share are taken once."""

    reduction: Reduction
    dtype: torch.dtype
    shared: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, one: Factor, two: Factor) -> Tensor:
        """[n, m] (for "trace" the sum over outputs, not yet the mean), [C, n, m] or [n, C, m, C]."""
        k = self._sums(one, two)  # [n, m], [C, n, m] or [C, n, C, m]
        return k.permute(1, 0, 3, 2) if self.reduction == "full" else k

    def _sums(self, one: Factor, two: Factor) -> Tensor:
        if isinstance(one, Rows) and isinstance(two, Rows):
            one, two = _compressed(one, two)
        if isinstance(one, Dense) and isinstance(two, Dense):
            return self._gradients(one.j, two.j)
        if isinstance(one, Outer | Rows) and type(one) is type(two):
            assert isinstance(two, Outer | Rows)
            if choose(one, one.n, two.n, self.reduction, self.dtype)[0] == "gram":
                single = one.positions == two.positions == one.groups == 1 and isinstance(one, Outer)
                return self._gram_single(one, two) if single else self._gram(one, two)  # type: ignore[arg-type]
        return self._by_jacobian(one, two)

    def _gradients(self, a: Tensor, b: Tensor) -> Tensor:
        """Σ_q of products of two [C, n, q], reduced; the last is remembered."""
        key = (*_identity(a), *_identity(b))
        if key not in self.shared:
            self.shared = {key: (a, b, self._pair(a, b))}  # a and b are held, so that no other takes their place
        return self.shared[key][2]

    def _pair(self, a: Tensor, b: Tensor) -> Tensor:
        out = self._zeros(a.shape[0], a.shape[1], b.shape[1], a.device)
        self._accumulate(out, a, b)
        return out

    def _zeros(self, c: int, n: int, m: int, device: torch.device) -> Tensor:
        shape = {"full": (c, n, c, m), "blocks": (c, n, m)}.get(self.reduction, (n, m))
        return torch.zeros(shape, dtype=self.dtype, device=device)

    def _accumulate(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds the products of J slabs [C, n, w] and [C, m, w] to the kernel, a stretch at a time, in `dtype`."""
        for start in range(0, a.shape[2], _STRETCH):
            x = a[:, :, start : start + _STRETCH].to(self.dtype)
            y = x if a is b else b[:, :, start : start + _STRETCH].to(self.dtype)
            if self.reduction == "full":
                _add_product(out.flatten(2).flatten(0, 1), x.flatten(0, 1), y.flatten(0, 1), a is b)
            elif self.reduction == "blocks":
                out.baddbmm_(x, y.transpose(1, 2))
            else:
                for u, v in zip(x, y, strict=True):
                    out.addmm_(u, v.T)

    def _by_jacobian(self, one: Factor, two: Factor) -> Tensor:
        """Σ over slabs of J Jᵀ."""
        one, two = aligned(one, two)
        same, c = one is two, one.outputs
        first = one.open()
        second = first if same else two.open()
        out = self._zeros(c, one.n, two.n, one.device)
        held = c if self.reduction == "full" else 1
        row = max(one.n, two.n) * one.trailing * held
        step = max(1, _SLAB // row, min(_SLAB_ROWS, _SLAB_MOST // row))
        for i in range(0, one.leading, step):
            j = min(i + step, one.leading)
            if self.reduction == "full":
                a = torch.stack([first(k, i, j).flatten(1) for k in range(c)])
                b = a if same else torch.stack([second(k, i, j).flatten(1) for k in range(c)])
                self._accumulate(out, a, b)
                continue
            for k in range(c):
                a = first(k, i, j).flatten(1)[None]
                b = a if same else second(k, i, j).flatten(1)[None]
                self._accumulate(out[k : k + 1] if self.reduction == "blocks" else out, a, b)
        return out

    def _gram_single(self, one: Outer, two: Outer) -> Tensor:
        """One position, one group: ⟨a, a'⟩ and ⟨g, g'⟩ are n × m."""
        a = one.inputs()[:, 0, 0].to(self.dtype)
        b = a if one is two else two.inputs()[:, 0, 0].to(self.dtype)
        inputs = torch.zeros(len(a), len(b), dtype=self.dtype, device=a.device)
        for start in range(0, a.shape[1], _STRETCH):
            inputs.addmm_(a[:, start : start + _STRETCH], b[:, start : start + _STRETCH].T)
        g = one.g[:, :, 0, 0]
        products = self._gradients(g, g if one is two else two.g[:, :, 0, 0])
        return products * (inputs[:, None] if self.reduction == "full" else inputs)

    def _gram(self, one: Outer | Rows, two: Outer | Rows) -> Tensor:
        """Σ_ss' ⟨a_s, a_s'⟩⟨g_s, g_s'⟩ summed over groups, in blocks of examples, lower blocks only where symmetric."""
        n, m, c, s, t = one.n, two.n, one.outputs, one.positions, two.positions
        same = one is two
        out = self._zeros(c, n, m, one.device)
        inputs1 = self._inputs(one)
        inputs2 = inputs1 if same else self._inputs(two)
        grams = c * c if self.reduction == "full" else 1
        size = max(1, min(int((_PAIRS / (s * t * one.groups * grams)) ** 0.5), -(-n // _STRIPS) if same else n))
        for rows in _blocks(n, size):
            a, ga = inputs1[rows], self._positions(one, rows)
            for columns in _blocks(m, size):
                if same and columns.start > rows.start:
                    break
                diagonal = same and columns == rows
                gb = ga if diagonal else self._positions(two, columns)
                part = self._block(self._input_products(one, a, inputs2[columns]), ga, gb, s, t)
                out[(..., rows, slice(None), columns) if self.reduction == "full" else (..., rows, columns)] = part
                if same and not diagonal:
                    if self.reduction == "full":
                        out[:, columns, :, rows] = part.permute(2, 3, 0, 1)
                    else:
                        out[..., columns, rows] = part.transpose(-1, -2)
        return out

    def _inputs(self, one: Outer | Rows) -> Tensor:
        """[n, G, S, p], or indices [n, S]."""
        return one.inputs().to(self.dtype) if isinstance(one, Outer) else one.index

    def _input_products(self, one: Outer | Rows, a: Tensor, b: Tensor) -> Tensor:
        """[G, b·s, m·t]."""
        if isinstance(one, Rows):
            return (a.reshape(-1, 1) == b.reshape(1, -1)).to(self.dtype)[None]
        x, y = (t.transpose(0, 1).flatten(1, 2) for t in (a, b))
        return x @ y.transpose(-1, -2)

    def _positions(self, one: Outer | Rows, rows: slice) -> Tensor:
        """[C, G, b·s, q]; [1, G, b·s, C·q] where the sum over outputs is all that is wanted."""
        g = one.g[:, rows] if isinstance(one, Outer) else one.g[:, rows, None]
        g = g.to(self.dtype).permute(0, 2, 1, 3, 4).flatten(2, 3)
        return g.permute(1, 2, 0, 3).flatten(2)[None] if self.reduction in ("trace", "sum") else g

    def _block(self, inputs: Tensor, ga: Tensor, gb: Tensor, s: int, t: int) -> Tensor:
        """[b, m], [C, b, m] or [C, b, C, m] of one block of pairs."""
        if self.reduction != "full":
            parts = [_sum_positions((x @ y.transpose(-1, -2)).mul_(inputs), s, t) for x, y in zip(ga, gb, strict=True)]
            return parts[0] if self.reduction in ("trace", "sum") else torch.stack(parts)
        groups, c = len(inputs), len(ga)
        products = ga.transpose(0, 1).flatten(1, 2) @ gb.transpose(0, 1).flatten(1, 2).transpose(-1, -2)
        products = products.reshape(groups, c, inputs.shape[1], c, inputs.shape[2]).mul_(inputs[:, None, :, None])
        products = products.sum(0).reshape(c, -1, s, c, inputs.shape[2] // t, t)
        return products.sum((2, 5))


def _identity(t: Tensor) -> tuple[int, ...]:
    return (t.untyped_storage()._cdata, t.storage_offset(), *t.shape, *t.stride())


def _sum_positions(products: Tensor, s: int, t: int) -> Tensor:
    """[G, b·s, m·t] → [b, m]."""
    total = products.sum(0)
    return total.reshape(-1, s, total.shape[1] // t, t).sum((1, 3))


def _add_product(out: Tensor, a: Tensor, b: Tensor, symmetric: bool) -> None:
    """out += a bᵀ; of a symmetric one the strips below the diagonal, mirrored."""
    n = len(a)
    if not symmetric or n < 64 * _STRIPS:
        out.addmm_(a, b.T)
        return
    size = -(-n // _STRIPS)
    for rows in _blocks(n, size):
        part = a[rows] @ a[: rows.stop].T
        out[rows, : rows.stop] += part
        out[: rows.start, rows] += part[:, : rows.start].T


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _compressed(one: Rows, two: Rows) -> tuple[Rows, Rows]:
    """The same lookups in a table of only the rows that occur."""
    if isinstance(one.index, FakeTensor):  # a plan: which rows occur is not known, only how many at most
        most = min(one.table, one.index.numel() + two.index.numel())
        first = Rows(one.index, one.g, most)
        return first, first if one is two else Rows(two.index, two.g, most)
    used = torch.cat([one.index.flatten(), two.index.flatten()]).unique()
    if len(used) >= one.table:
        return one, two
    first = Rows(torch.searchsorted(used, one.index), one.g, len(used))
    return first, first if one is two else Rows(torch.searchsorted(used, two.index), two.g, len(used))

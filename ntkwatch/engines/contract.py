"""Contraction of factors into a kernel, by the cheapest exact method for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ntkwatch.engines.accumulation import Accumulator
from ntkwatch.engines.chunked_matmul import CHUNK, at_once, blocks, row_block_size
from ntkwatch.engines.contraction_costs import choose, full_rows, gram_rows
from ntkwatch.engines.factor_sums import aligned
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows, Slab
from ntkwatch.engines.machines import machine
from ntkwatch.engines.per_output import PerOutput

_SMALL_SLAB = 1 << 18  # entries of a slab of J if memory is short
_SLAB_ROWS = 64  # the fewest rows of a slab: below, matrix products slow down
_SLAB_MOST = 1 << 25


class Contractor(Accumulator):
    """Adds the products of pairs of factors to a kernel, one parameter at a time."""

    def add(self, out: Tensor, one: Factor, two: Factor) -> None:
        """Adds J₁ J₂ᵀ, summed over the parameter's entries, to `out`; for "trace" the sum over outputs, not yet the
        mean.
        """
        if isinstance(one, Rows) and isinstance(two, Rows):
            one, two = _compressed(one, two)
        elif isinstance(one, Outer) and isinstance(two, Outer):
            one, two = _unordered(one, two)
        if isinstance(one, Dense) and isinstance(two, Dense):
            out += self._gradients(one.j, two.j)
        elif self._by_gram(one, two):
            gram = self._gram_full if self.reduction == "full" else self._gram
            (self._gram_single if is_single(one, two) else gram)(out, one, two)  # type: ignore[arg-type]
        else:
            self._by_jacobian(out, one, two)

    def _by_gram(self, one: Factor, two: Factor) -> bool:
        """Whether Grams of inputs times Grams of output gradients are cheaper than Jacobians."""
        if not isinstance(one, Outer | Rows) or type(one) is not type(two):
            return False
        return choose(one, self._scaled(one.n), self._scaled(two.n), self.reduction, self.dtype, self.same)[0] == "gram"

    # ── contractions ──────────────────────────────────────────────────────────────────────────────────────────────
    def _by_jacobian(self, out: Tensor, one: Factor, two: Factor) -> None:
        """Multiplies each slab of J with the other factor's slab (or itself) as soon as it is computed."""
        one, two = aligned(one, two)
        at, full = machine(one.device), self.reduction == "full"
        together = (full or not at.near) and all(isinstance(f, Outer) and f.in_one_product for f in (one, two))
        first = self._opened(one, 0, together)
        second = first if one is two else self._opened(two, 1, together)
        held = 1 if at.near and not full else one.outputs
        row = self._scaled(max(one.n, two.n)) * one.trailing * held
        slab = _SMALL_SLAB if self.short else at.slab
        least = 1 if at.near and together else min(_SLAB_ROWS, _SLAB_MOST // row)
        step = min(one.leading, max(1, slab // row, least))
        # a separate sum per parameter: one float32 sum over many parameters would lose digits
        turned = full and together
        total = self._by_example(out) if turned else torch.zeros_like(out)
        for rows in blocks(one.leading, step):
            for start in range(0, one.outputs, held):
                outputs = range(start, start + held)
                a = first(outputs, rows)
                b = a if one is two else second(outputs, rows)
                self._products(total[start : start + held] if self.reduction == "blocks" else total, a, b)
        if turned:
            self._mirror(total)  # `total` and `out` have different row blocks
        out += total

    def _opened(self, one: Factor, key: int, together: bool) -> Callable[[range, slice], Tensor]:
        """A function that returns slabs of J [outputs, n, rows·trailing] in `dtype`; one product if `together`."""
        if together and isinstance(one, Outer):
            whole = one.together()
            return lambda outputs, rows: self._slab_together(whole, one, rows, key)
        slab = one.open()
        return lambda outputs, rows: self._slab(slab, one, outputs, rows, key)

    def _slab_together(self, slab: Callable[..., object], one: Outer, rows: slice, key: int) -> Tensor:
        """The slabs of all outputs from one product, in a reused buffer."""
        shape = (one.n, one.outputs, rows.stop - rows.start, one.trailing)
        made = self._buffer(key, math.prod(shape), one.dtype, one.device).view(shape)
        held = self._buffer(3, math.prod(shape[:3]) * one.positions, one.dtype, one.device)
        slab(rows.start, rows.stop, held, made)
        return self._cast(made.flatten(2), key).transpose(0, 1)

    def _slab(self, slab: Slab, one: Factor, outputs: range, rows: slice, key: int) -> Tensor:
        """The slabs of some outputs, one product each, in a reused buffer."""
        shape = (len(outputs), one.n, rows.stop - rows.start, one.trailing)
        made = self._buffer(key, math.prod(shape), one.dtype, one.device).view(shape)
        for c, out in zip(outputs, made, strict=True):
            slab(c, rows.start, rows.stop, out)
        return self._cast(made.flatten(2), key)

    def _gram_single(self, out: Tensor, one: Outer, two: Outer) -> None:
        """The kernel of one position and one group: ⟨a, a'⟩ [n, m] times ⟨g, g'⟩."""
        a = one.inputs()[:, 0, 0].to(self.dtype)
        b = a if self.same else two.inputs()[:, 0, 0].to(self.dtype)
        inputs = torch.zeros(len(a), len(b), dtype=self.dtype, device=a.device)
        for start in range(0, a.shape[1], CHUNK):
            inputs.addmm_(a[:, start : start + CHUNK], self._right(b[:, start : start + CHUNK]).T)
        g = alone(one)
        products = self._gradients(g, g if self.same else alone(two))
        if self.reduction != "full":
            out.addcmul_(products, inputs)
            return
        size = row_block_size(self._matrices(out)[0], self.same)
        for r in blocks(one.outputs, max(1, size // one.n)):
            end = -(-r.stop * one.n // size) * size  # of the strip that contains the last row
            c = slice(0, -(-end // two.n) if self.same else two.outputs)
            out[r, :, c].addcmul_(products[r, :, c], inputs[:, None])

    def _gram(self, out: Tensor, one: Outer | Rows, two: Outer | Rows) -> None:
        """Σ_ss' ⟨a_s, a_s'⟩⟨g_s, g_s'⟩ summed over groups, in blocks of examples; lower blocks only if symmetric."""
        s, t = one.positions, two.positions
        size = self._pair_rows(one, s * t * one.groups)
        inputs1 = self._inputs(one)
        inputs2 = inputs1 if self.same else self._inputs(two)
        for rows in self._blocks(one.n, size):
            a, ga = inputs1[rows], self._positions(one, rows)
            for columns in self._blocks(two.n, size):
                if self.same and columns.start > rows.start:
                    break
                gb = ga if self.same and columns == rows else self._positions(two, columns)
                part = self._block(self._input_products(one, a, inputs2[columns]), ga, gb, s, t)
                out[..., rows, columns] += part
                if self.same and columns != rows:
                    out[..., columns, rows] += part.transpose(-1, -2)

    def _pair_rows(self, one: Outer | Rows, pairs: int) -> int:
        """Examples per block of pairs, where a pair of examples has `pairs` entries."""
        return max(1, round(self._large_pair_rows(one, pairs) / self.scale))

    def _large_pair_rows(self, one: Outer | Rows, pairs: int) -> int:
        return gram_rows(one, self._scaled(one.n), pairs, self.same)

    def _blocks(self, n: int, size: int) -> Iterator[slice]:
        """Slices of at most `size` examples."""
        return blocks(n, size)

    def _gram_full(self, out: Tensor, one: Outer | Rows, two: Outer | Rows) -> None:
        """⟨Σ_s ⟨a_s, a_s'⟩ g_cs, g_ds'⟩, an example with all others: C times less than ⟨g_cs, g_ds'⟩ of all pairs."""
        inputs1 = self._inputs(one)
        inputs2 = inputs1 if self.same else self._inputs(two)
        g = self._lined_up(two, slice(0, two.n)).stacked()
        if not machine(one.device).near:
            self._gram_full_together(out, one, inputs1, inputs2, g)
            return
        size = max(1, round(full_rows(two) / self.scale))
        for i in self._each(one.n):
            mine = self._positions(one, slice(i, i + 1))
            for columns in blocks(i + 1 if self.same else two.n, size):
                a = self._input_products(one, inputs1[i : i + 1], inputs2[columns])
                part = self._weighted(a, mine, g, columns, two.positions)
                out[:, i, :, columns] += part.permute(1, 2, 0)
                if self.same:
                    others = slice(columns.start, min(columns.stop, i))
                    out[:, others, :, i] += part[: others.stop - others.start].permute(2, 0, 1)

    def _gram_full_together(self, out: Tensor, one: Outer | Rows, inputs1: Tensor, inputs2: Tensor, g: Tensor) -> None:
        """The same in few calls: blocks of examples on both sides, both halves of a symmetric kernel."""
        (c, _, _, q), m, s, size = g.shape, len(inputs2), one.positions, full_rows(one)
        others = g.unflatten(2, (m, -1)).permute(1, 2, 0, 3, 4).flatten(3)  # [G, m, C, t·q]
        for rows in self._blocks(one.n, max(1, size // m)):
            mine = self._lined_up(one, rows).stacked().unflatten(2, (-1, s)).permute(1, 2, 3, 0, 4)  # [G, b, s, C, q]
            for columns in self._blocks(m, size):
                y = others[:, columns]
                a = self._input_products(one, inputs1[rows], inputs2[columns]).unflatten(1, (-1, s)).transpose(2, 3)
                sums = (a @ mine.flatten(3)).unflatten(3, (c, q)).unflatten(2, (y.shape[1], -1))  # [G, b, m, t, C, q]
                x = sums.permute(0, 2, 1, 4, 3, 5).flatten(4).flatten(2, 3).flatten(0, 1)
                part = at_once(x, y.flatten(0, 1)).unflatten(1, (-1, c)).unflatten(0, (-1, y.shape[1])).sum(0)
                out[:, rows, :, columns] += part.permute(2, 1, 3, 0)  # of [m, b, C, C]

    def _each(self, n: int) -> Iterable[int]:
        """The numbers of all examples."""
        return range(n)

    def _weighted(self, a: Tensor, mine: list[Tensor], g: Tensor, columns: slice, t: int) -> Tensor:
        """[m, C, C] from input products a [G, s, m·t], gradients C × [G, s, q] and the others' [C, G, ·, q]."""
        (groups, _, width), (c, *_, q) = a.shape, g.shape
        held = self._buffer(2, c * groups * width * q, self.dtype, a.device).view(c, groups, width, q)
        for each, sums in zip(mine, held, strict=True):
            torch.bmm(a.transpose(1, 2), each, out=sums)
        others = g[:, :, columns.start * t : columns.stop * t]
        x, y = (h.unflatten(2, (-1, t)).flatten(3).permute(1, 2, 0, 3).flatten(0, 1) for h in (held, others))
        part = torch.zeros(len(x), c, c, dtype=self.dtype, device=a.device)
        for u, v in zip(x.split(CHUNK, 2), y.split(CHUNK, 2), strict=True):
            part.baddbmm_(u, v.transpose(1, 2))
        return part.unflatten(0, (groups, -1)).sum(0)

    def _inputs(self, one: Outer | Rows) -> Tensor:
        """Inputs [n, G, S, p], or indices [n, S]."""
        return one.inputs().to(self.dtype) if isinstance(one, Outer) else one.index

    def _input_products(self, one: Outer | Rows, a: Tensor, b: Tensor) -> Tensor:
        """Products of inputs at all pairs of positions [G, b·s, m·t]."""
        if isinstance(one, Rows):
            return (a.reshape(-1, 1) == b.reshape(1, -1)).to(self.dtype)[None]
        x, y = (t.transpose(0, 1).flatten(1, 2) for t in (a, b))
        return x @ y.transpose(-1, -2)

    def _positions(self, one: Outer | Rows, rows: slice) -> list[Tensor]:
        """C × [G, b·s, q]; fewer and wider tensors where their products are summed and they are stacked."""
        g = self._lined_up(one, rows)
        if isinstance(g.parts, Tensor) and self.reduction in ("trace", "sum"):
            return list(g.parts.movedim(0, -2).flatten(-2).split(CHUNK, -1))
        return list(g)

    def _lined_up(self, one: Outer | Rows, rows: slice) -> PerOutput:
        """Gradients of some examples [G, b·s, q], the positions of one example after those of the previous one."""
        g = one.g if isinstance(one, Outer) else one.g.over(lambda t: t.unsqueeze(-3))
        some = g.over(lambda t: t[..., rows, :, :, :].to(self.dtype))
        return some.over(lambda t: t.transpose(-4, -3).flatten(-3, -2))

    def _block(self, inputs: Tensor, ga: list[Tensor], gb: list[Tensor], s: int, t: int) -> Tensor:
        """The kernel [b, m] or [C, b, m] of one block of pairs."""
        if self.reduction in ("trace", "sum"):
            products = ga[0] @ gb[0].transpose(-1, -2)
            for x, y in zip(ga[1:], gb[1:], strict=True):
                products.baddbmm_(x, y.transpose(-1, -2))
            return _sum_positions(products.mul_(inputs), s, t)
        parts = [_sum_positions((x @ y.transpose(-1, -2)).mul_(inputs), s, t) for x, y in zip(ga, gb, strict=True)]
        return torch.stack(parts)


def _unordered(one: Outer, two: Outer) -> tuple[Outer, Outer]:
    """Both factors with their entries in the fastest order, where they agree on one."""
    if one.a_first != two.a_first or (one.a.quick is None) != (two.a.quick is None):
        return one, two
    first = one.unordered()
    return first, first if one is two else two.unordered()


def is_single(one: Factor, two: Factor) -> bool:
    """Whether each Jacobian is one outer product: a weight used at one position, in one group."""
    return isinstance(one, Outer) and isinstance(two, Outer) and one.positions == two.positions == one.groups == 1


def alone(one: Outer) -> PerOutput:
    """The output gradients of a weight used at one position: C × [n, q]."""
    return one.g.over(lambda t: t[..., 0, 0, :])


def _sum_positions(products: Tensor, s: int, t: int) -> Tensor:
    """[G, b·s, m·t] → [b, m], summed over groups and positions."""
    total = products.sum(0) if len(products) > 1 else products[0]
    return total.reshape(-1, s, total.shape[1] // t, t).sum((1, 3))


def _compressed(one: Rows, two: Rows) -> tuple[Rows, Rows]:
    """The same lookups in a table reduced to the rows that occur."""
    used = torch.cat([one.index.flatten(), two.index.flatten()]).unique()  # sorted
    if len(used) >= one.table:
        return one, two
    first = Rows(torch.searchsorted(used, one.index.contiguous()), one.g, len(used))
    return first, first if one is two else Rows(torch.searchsorted(used, two.index.contiguous()), two.g, len(used))

"""Every way to contract a factor gives the same kernel: Σ over entries of J Jᵀ, written out in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from ntkwatch.engines import contract, machines
from ntkwatch.engines.base import Reduction
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.factor_sums import densify
from ntkwatch.engines.factors import Columns, Dense, Factor, Outer, Rows
from ntkwatch.engines.per_output import PerOutput

# n, C, groups, positions, p, q. Rows of a full kernel: below a strip, several narrow ones, and wide ones of float32.
SHAPES = [(3, 2, 1, 4, 5, 3), (23, 4, 1, 3, 7, 9), (45, 9, 1, 2, 3, 4), (6, 3, 4, 5, 2, 3), (50, 2, 1, 1, 6, 5)]
KINDS = [(kind, together) for kind in ("outer", "rows", "dense") for together in (False, True)]


def made(kind: tuple[str, bool], shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Factor:
    n, c, groups, s, p, q = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    def each(*size: int) -> PerOutput:
        found = normal(c, *size)
        return PerOutput(found if together else found.unbind())

    form, together = kind
    if form == "outer":
        return Outer(Columns.of(normal(n, groups, s, p)), each(n, groups, s, q))
    if form == "rows":
        return Rows(torch.randint(0, 6, (n, s), generator=generator), each(n, s, q), 6)
    return Dense(each(n, p * q))


def exact(one: Factor, two: Factor, reduction: Reduction) -> Tensor:
    """In the shape that `Contractor.finish` gives; "sum" is taken of a single output."""
    a, b = (densify(f).j.stacked().double() for f in (one, two))
    whole = torch.einsum("cnp,dmp->ncmd", a, b)
    blocks = whole.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    return {"full": whole.permute(0, 1, 2, 3), "blocks": blocks}.get(reduction, blocks.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["gram", "jacobian"])
@pytest.mark.parametrize("same", [True, False], ids=["itself", "others"])
@pytest.mark.parametrize("pairs", [1 << 23, 1 << 8], ids=["at once", "in blocks"])
@pytest.mark.parametrize("kind_of_machine", machines.MACHINES)
def test_all_ways_agree(
    dtype: torch.dtype, way: str, same: bool, pairs: int, kind_of_machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "choose", lambda *_: (way, None))
    few = dataclasses.replace(machines.MACHINES[kind_of_machine], pairs=pairs)
    monkeypatch.setitem(machines.MACHINES, "cpu", few)
    for kind, shape, reduction in itertools.product(KINDS, SHAPES, get_args(Reduction)):
        one = made(kind, shape, 0, dtype)
        two = one if same else made(kind, (shape[0] + 2, *shape[1:]), 1, dtype)
        contractor = Contractor(reduction, dtype, same)
        out = contractor.zeros(one.outputs, one.n, two.n, torch.device("cpu"))
        contractor.add(out, one, two)
        right = exact(one, two, reduction)
        found = contractor.finish(out, one.outputs)
        off = float((found.double() - right).norm() / right.norm())
        assert off < 30 * torch.finfo(dtype).eps, f"{kind} {shape} {reduction}: off by {off:.1e}"


@pytest.mark.parametrize("rows", [5, 24, 100, 384, 500])
def test_long_products_in_strips_lose_no_digits(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 20_000, generator=generator)  # all positive: a float32 sum that is too long would show
    contractor = Contractor("trace", torch.float32, True)
    out = contractor.zeros(1, rows, rows, x.device)
    contractor.add(out, Dense(PerOutput((x,))), Dense(PerOutput((x,))))
    right = x.double() @ x.double().T
    off = float((contractor.finish(out, 1).double() - right).abs().max() / right.abs().max())
    assert off < 1e-6, f"{rows} rows: off by {off:.1e}"

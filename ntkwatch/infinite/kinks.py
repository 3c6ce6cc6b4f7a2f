"""Where a function of one variable has kinks, and by how much it and its first two derivatives jump there.

A cell of the line is smooth where a polynomial through some of its points meets the others. One that is not is halved:
what is analytic becomes smooth on the way, and what is still none in cells a thousandth as wide holds a kink.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

Pair = Callable[[Tensor], tuple[Tensor, Tensor]]  # u -> φ(u), φ'(u)

ORDERS = 3  # the function itself, its slope and its curvature
MAX_KINKS = 64  # kinks that are taken, those nearest to 0
_DEGREE = 12
_ROUGH = 1e-9  # of the function's size: what a polynomial may miss of an analytic function
_OCTAVES, _PARTS = 12, 8  # cells over each sign: those of an octave are as wide, relative to where they are
_DEEP = 2.0**-10  # of the first cell's width: analytic functions are resolved before
_CELLS = 20_000  # at one time: a function that needs more is not resolved at all
_UNEVEN = 0.4871  # no cell ends at a round number, where kinks like to be


def find_kinks(function: Pair, reach: float) -> tuple[float, ...]:
    """The kinks in [-reach, reach], ascending; none where the function is not smooth between a countable few."""
    lo, hi = _cells(reach)
    values = _at(function, _points(lo, hi, _nodes()[0]))
    size = _running_size(np.abs(values).max(-1), lo, hi)
    first, width = np.arange(len(lo)), hi - lo
    rough: list[tuple[float, float]] = []  # (width, middle) of cells that hold a kink, whole chains of them
    while len(lo):
        if len(lo) > _CELLS:
            return ()
        left = _misses(function, lo, hi) > _ROUGH * size[:, first]
        open_ = left.any(0)
        lo, hi, first = lo[open_], hi[open_], first[open_]
        middle = lo + _UNEVEN * (hi - lo)
        deep = hi - lo <= _DEEP * width[first]
        rough += list(zip((hi - lo)[deep].tolist(), middle[deep].tolist(), strict=True))
        wide = hi - lo > 8 * np.finfo(float).eps * np.maximum(np.abs(middle), reach * 1e-9)
        lo, hi = np.concatenate([lo[wide], middle[wide]]), np.concatenate([middle[wide], hi[wide]])
        first = np.concatenate([first[wide], first[wide]])
    return _ends(rough)


def find_jumps(function: Pair, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Jumps of φ, φ', φ'' and of φ' (as given), its slope and its curvature at the kinks, two [3, K]."""
    found = np.zeros((2, ORDERS, len(kinks)))
    for i, t in enumerate(kinks):
        gaps = [abs(t - other) for other in (*kinks[max(0, i - 1) : i], *kinks[i + 1 : i + 2])]
        room = 0.5 * min([*gaps, 1.0 + abs(t)])
        (left, a, low), (right, b, high) = (_one_sided(function, t, side * room) for side in (-1, 1))
        step = right - left
        visible = np.abs(step) * min(a, b) ** np.arange(ORDERS) > 1e2 * _ROUGH * np.maximum(low, high)[:, None]
        found[:, :, i] = np.where(visible, step, 0)
    value, slope = torch.from_numpy(found)
    return value, slope


def _one_sided(function: Pair, t: float, room: float) -> tuple[np.ndarray, float, np.ndarray]:
    """(derivatives [2, 3] at the side of t that `room` points to, the width they were taken from, size [2])."""
    nodes, _, to_coefficients = _nodes()
    for _ in range(40):
        lo, hi = np.array([min(t, t + room)]), np.array([max(t, t + room)])
        values = _at(function, _points(lo, hi, nodes))[:, 0]
        size = np.abs(values).max(-1)
        if (_misses(function, lo, hi, inner=True)[:, 0] <= _ROUGH * np.maximum(size, size.max() * 1e-3)).all():
            break
        room /= 2
    series = values @ to_coefficients.T
    at = 1.0 if room < 0 else -1.0
    scale = 2 / abs(room)
    taken = [[chebyshev.chebval(at, chebyshev.chebder(c, n)) * scale**n for n in range(ORDERS)] for c in series]
    return np.array(taken), abs(room), size


@lru_cache(maxsize=1)
def _nodes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes in [-1, 1], further points with both ends, and the matrix from values at the nodes to coefficients."""
    nodes = chebyshev.chebpts1(_DEGREE + 1)
    return nodes, chebyshev.chebpts2(_DEGREE + 2), np.linalg.inv(chebyshev.chebvander(nodes, _DEGREE))


def _misses(function: Pair, lo: np.ndarray, hi: np.ndarray, inner: bool = False) -> np.ndarray:
    """[2, cells]: by how much the polynomial through the nodes misses φ and φ' at the further points."""
    nodes, points, to_coefficients = _nodes()
    points = points[1:-1] if inner else points
    predict = chebyshev.chebvander(points, _DEGREE) @ to_coefficients
    values, others = (_at(function, _points(lo, hi, x)) for x in (nodes, points))
    missed = np.abs(values @ predict.T - others).max(-1)
    return np.nan_to_num(missed, nan=0.0)  # where the function is not defined there is nothing to find


def _at(function: Pair, u: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        value, slope = function(torch.from_numpy(u.ravel()))
        return np.stack([value.numpy().reshape(u.shape), slope.numpy().reshape(u.shape)])


def _points(lo: np.ndarray, hi: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[cells, points]."""
    return lo[:, None] + (hi - lo)[:, None] * (1 + x) / 2


def _cells(reach: float) -> tuple[np.ndarray, np.ndarray]:
    positive = 1.0137 * reach * 2.0 ** (-np.arange(_OCTAVES * _PARTS + 1) / _PARTS)
    edges = np.sort(np.concatenate([-0.9871 * positive, positive]))
    return edges[:-1], edges[1:]


def _running_size(largest: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """[2, cells]: the largest size at most as far from 0; tails are not held to their own tiny size."""
    order = np.argsort(np.maximum(np.abs(lo), np.abs(hi)))
    size = np.empty_like(largest)
    size[:, order] = np.maximum.accumulate(np.nan_to_num(largest[:, order]), axis=1)
    return size + np.finfo(float).tiny


def _ends(rough: list[tuple[float, float]]) -> tuple[float, ...]:
    """The last cell of each chain: its kink, once."""
    found: list[float] = []
    for width, middle in sorted(rough):
        if all(abs(middle - other) > 2 * width + 1e-9 * abs(other) for other in found):
            found.append(middle)
    return tuple(sorted(sorted(found, key=abs)[:MAX_KINKS]))

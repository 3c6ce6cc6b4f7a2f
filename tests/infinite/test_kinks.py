"""Activations with kinks: their duals equal an integral that is cut at the kinks, and where kinks are is found."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ntkwatch import infinite
from ntkwatch.infinite.kinks import find_kinks

Function = Callable[[Tensor], Tensor]
FAR = 9.0  # standard deviations
# name -> function, and where it or its first two derivatives jump
KINKED: dict[str, tuple[Function, tuple[float, ...]]] = {
    "sign": (torch.sign, (0,)),
    "step": (lambda u: (u > 0).to(u), (0,)),
    "step at 1": (lambda u: (u >= 1).to(u), (1,)),
    "hardtanh": (F.hardtanh, (-1, 1)),
    "relu6": (F.relu6, (0, 6)),
    "relu6(4u)": (lambda u: F.relu6(4 * u), (0, 1.5)),
    "hardswish": (F.hardswish, (-3, 3)),
    "hardsigmoid": (F.hardsigmoid, (-3, 3)),
    "abs": (torch.abs, (0,)),
    "leaky relu": (lambda u: F.leaky_relu(u, 0.2), (0,)),
    "threshold": (lambda u: torch.where(u.abs() > 0.7, u, torch.zeros_like(u)), (-0.7, 0.7)),
    "softshrink": (F.softshrink, (-0.5, 0.5)),
    "hardshrink": (F.hardshrink, (-0.5, 0.5)),
    "clamp(-.1, .1)": (lambda u: u.clamp(-0.1, 0.1), (-0.1, 0.1)),
    "squared relu": (lambda u: F.relu(u) ** 2, (0,)),
    "elu": (F.elu, (0,)),
    "relu(u - 1e-3)": (lambda u: F.relu(u - 1e-3), (1e-3,)),
}
SMOOTH: dict[str, Function] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp(-u²)": lambda u: torch.exp(-u * u)}
PAIRS = [(1.0, 1.0, 0.3), (0.3, 2.0, -0.5), (4.0, 0.05, 0.9), (1.0, 1.0001, 0.9999), (9.0, 9.0, 1.0), (2.0, 2.0, -1.0)]


def density(z: np.ndarray) -> np.ndarray:
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)


def panels(breaks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre nodes and weights on every interval between breaks [..., B]."""
    x, w = np.polynomial.legendre.leggauss(16)
    ends = np.sort(np.clip(breaks, -FAR, FAR), axis=-1)
    lo, width = ends[..., :-1, None], np.diff(ends)[..., None]
    shape = (*ends.shape[:-1], -1)
    return (lo + width * (1 + x) / 2).reshape(shape), (width * w / 2).reshape(shape)


def expectation(f: Callable[[np.ndarray], np.ndarray], at: tuple[float, ...], q: float, r: float, c: float) -> float:
    """E[f(u)f(v)] for variances q, r and correlation c, cut where u or v meets a kink."""
    kinks, grid, a, b = np.array(at, float), np.arange(-FAR, FAR + 0.25, 0.5), np.sqrt(q), np.sqrt(r)
    s = np.sqrt(max(0.0, 1 - c * c))
    near = [(kinks / b + m * s) / c for m in (-8, -6, -4, -3, -2, -1, -0.5, -0.2, 0, 0.2, 0.5, 1, 2, 3, 4, 6, 8)]
    z, w = panels(np.concatenate([grid, kinks / a, *near]))
    if s == 0:
        return float((w * density(z) * f(a * z) * f(b * c * z)).sum())
    cuts = (kinks / b - c * z[:, None]) / s
    y, wy = panels(np.concatenate([np.broadcast_to(grid, (len(z), len(grid))), cuts], 1))
    inner = (wy * density(y) * f(b * (c * z[:, None] + s * y))).sum(1)
    return float((w * density(z) * f(a * z) * inner).sum())


@pytest.mark.parametrize("name", KINKED)
def test_duals_of_kinked_functions(name: str) -> None:
    """φφ and φ'φ' within 1e-6 of E[φ²] and E[φ'²] at any correlation, or within the error that `error` bounds."""
    function, at = KINKED[name]
    activation = infinite.Activation(function)

    def part(i: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda u: activation.apply(torch.from_numpy(np.ascontiguousarray(u)))[i].numpy()

    for q, r, c in PAIRS:
        one, two, k = (torch.tensor([v], dtype=torch.float64) for v in (q, r, c * (q * r) ** 0.5))
        got = activation.dual(k, activation.prepare(one), activation.prepare(two))
        bound = 1e-6 + max(float(activation.error(v)) for v in (one, two))
        for i, value in enumerate(got):
            assert value is not None
            size = np.sqrt(expectation(part(i), at, q, q, 1.0) * expectation(part(i), at, r, r, 1.0))
            off = abs(float(value) - expectation(part(i), at, q, r, c))
            what = f"{name}, {'φ' if i == 0 else 'its slope'} at {q}, {r}, {c}"
            assert off <= bound * size + 1e-300, f"{what}: off by {off / size:.1e} of its size, bound {bound:.1e}"


@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_found(name: str) -> None:
    function, at = KINKED[name]
    found = find_kinks(infinite.Activation(function).apply, 16.0)
    assert found == pytest.approx(sorted(at), abs=1e-6), f"{name}: {found}"


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_have_no_kinks(name: str) -> None:
    assert find_kinks(infinite.Activation(SMOOTH[name]).apply, 16.0) == (), name


def test_kinks_that_are_told_serve_as_those_that_are_found() -> None:
    found, told = infinite.Activation(F.hardtanh), infinite.Activation(F.hardtanh, kinks=(1.0, -1.0))
    q, k = torch.tensor([1.3], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    values = [float(a.dual(k.clone(), a.prepare(q), a.prepare(q))[0]) for a in (found, told)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_what_varies_too_fast_says_by_how_much_it_may_be_off() -> None:
    """Where no series of this length follows a function, a warning gives the error's bound."""
    fast = infinite.Activation(lambda u: torch.sin(1000 * u))
    q = torch.tensor([1.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="may be off by .* Pass a larger degree="):
        fast.prepare(q)
    assert float(fast.error(q)) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infinite.Activation(torch.tanh).prepare(q)


def test_without_its_kinks_the_oracle_sees_a_difference() -> None:
    """Negative control: a series alone, as a kink asks of it, is off by more than the bound above."""
    series = infinite.Activation(torch.sign, kinks=())
    q, k = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.9999], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value, _ = series.dual(k, series.prepare(q), series.prepare(q))
    assert abs(float(value) - 2 / np.pi * np.arcsin(0.9999)) > 1e-4

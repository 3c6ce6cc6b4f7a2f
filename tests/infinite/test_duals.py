"""Every dual activation equals a 30-digit integral over the bivariate Gaussian."""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import pytest
import torch

from ntkwatch import infinite

VARIANCES = [(1.0, 1.0, 0.5), (0.3, 2.0, -0.7), (4.0, 0.05, 0.2), (2.5, 2.5, 0.999), (1.3, 0.4, -1.0), (0.8, 0.8, 0.0)]
Function = Callable[[mp.mpf], mp.mpf]


def _phi(x: mp.mpf) -> mp.mpf:
    return mp.npdf(x)


SMOOTH: dict[str, tuple[infinite.Elementwise, Function, Function]] = {
    "erf": (infinite.Erf(), mp.erf, lambda x: 2 / mp.sqrt(mp.pi) * mp.exp(-x * x)),
    "gelu": (infinite.Gelu(), lambda x: x * mp.ncdf(x), lambda x: mp.ncdf(x) + x * _phi(x)),
    "sin": (infinite.Sin(), mp.sin, mp.cos),
    "tanh by quadrature": (infinite.Activation(torch.tanh), mp.tanh, lambda x: mp.sech(x) ** 2),
    "gelu by quadrature": (
        infinite.Activation(torch.nn.functional.gelu),
        lambda x: x * mp.ncdf(x),
        lambda x: mp.ncdf(x) + x * _phi(x),
    ),
    "x³ - x by quadrature": (infinite.Activation(lambda x: x**3 - x), lambda x: x**3 - x, lambda x: 3 * x * x - 1),
}
KINKED: dict[str, tuple[infinite.ABRelu, float, float]] = {
    "relu": (infinite.Relu(), 0, 1),
    "leaky relu": (infinite.LeakyRelu(0.2), 0.2, 1),
    "abs": (infinite.Abs(), -1, 1),
    "ab relu": (infinite.ABRelu(0.5, -1.5), 0.5, -1.5),
}


def _dual(activation: infinite.Elementwise, q: float, r: float, c: float) -> tuple[float, float]:
    a, b, k = (torch.tensor([v], dtype=torch.float64) for v in (q, r, c * (q * r) ** 0.5))
    value, slope = activation.dual(k, activation.prepare(a), activation.prepare(b))
    assert slope is not None
    return float(value), float(slope)


def _trapezoid(f: Function, q: float, r: float, c: float, step: mp.mpf) -> mp.mpf:
    """E[f(u)f(v)]: the trapezoidal rule converges exponentially for analytic functions under a Gaussian."""
    nodes = [step * i for i in range(-int(10 / step), int(10 / step) + 1)]
    weights = [step * _phi(z) for z in nodes]
    s, cos = mp.sqrt(r), mp.mpf(c)
    sin = mp.sqrt(1 - cos * cos)
    if sin == 0:
        return mp.fsum(w * f(mp.sqrt(q) * z) * f(s * cos * z) for z, w in zip(nodes, weights, strict=True))
    inner = (mp.fsum(w * f(s * (cos * z + sin * y)) for y, w in zip(nodes, weights, strict=True)) for z in nodes)
    return mp.fsum(w * f(mp.sqrt(q) * z) * i for z, w, i in zip(nodes, weights, inner, strict=True))


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals(name: str) -> None:
    activation, f, slope = SMOOTH[name]
    step = mp.mpf(1) / 4 if "tanh" not in name else mp.mpf(1) / 8
    for q, r, c in VARIANCES[:: 1 if name in ("erf", "sin") else 2]:
        with mp.workdps(25):
            expected = [float(_trapezoid(g, q, r, c, step)) for g in (f, slope)]
        assert _dual(activation, q, r, c) == pytest.approx(expected, abs=1e-10, rel=1e-10), f"{name} at {q}, {r}, {c}"


@pytest.mark.parametrize("name", KINKED)
def test_kinked_duals(name: str) -> None:
    activation, a, b = KINKED[name]
    for q, r, c in VARIANCES:
        with mp.workdps(30):
            alpha = mp.acos(mp.mpf(c))
            kinks = sorted({x % (2 * mp.pi) for x in (mp.pi / 2, -mp.pi / 2, alpha + mp.pi / 2, alpha - mp.pi / 2)})
            ends = [mp.mpf(0), *kinks, 2 * mp.pi]

            def piece(x: mp.mpf, order: int) -> mp.mpf:
                return (b if x > 0 else a) * (x if order == 0 else 1)

            def angular(order: int) -> mp.mpf:
                return mp.quad(lambda t: piece(mp.cos(t), order) * piece(mp.cos(t - alpha), order), ends)  # noqa: B023

            # in polar coordinates the radius integrates to 2 for φφ, to 1 for φ'φ'
            expected = [float(mp.sqrt(q) * mp.sqrt(r) * angular(0) / mp.pi), float(angular(1) / (2 * mp.pi))]
        got = _dual(activation, q, r, c)
        assert got == pytest.approx(expected, abs=1e-7 if abs(c) > 0.99 else 1e-12), f"{name} at {q}, {r}, {c}"


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_means(name: str) -> None:
    """E[φ(u)], which LayerNorm subtracts."""
    if name in SMOOTH:
        activation, f, _ = SMOOTH[name]
    else:
        activation, a, b = KINKED[name]
        f = lambda x: (b if x > 0 else a) * x  # noqa: E731
    for q in (0.05, 1.0, 3.0):
        with mp.workdps(20):
            expected = float(mp.quad(lambda z: f(mp.sqrt(q) * z) * _phi(z), [-10, 0, 10]))  # noqa: B023
        got = activation.first(torch.tensor([q], dtype=torch.float64))
        assert (0.0 if got is None else float(got)) == pytest.approx(expected, abs=1e-12), f"{name} at {q}"


@pytest.mark.parametrize("name", [*SMOOTH, *KINKED])
def test_zero_and_equal_inputs(name: str) -> None:
    activation = SMOOTH[name][0] if name in SMOOTH else KINKED[name][0]
    for q, r, k in [(0.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1e-300, 1e-300, 1e-300), (1e8, 1e8, 1e8), (1e8, 1e8, -1e8)]:
        a, b, kk = (torch.tensor([v], dtype=torch.float64) for v in (q, r, k))
        value, slope = activation.dual(kk, activation.prepare(a), activation.prepare(b))
        assert slope is not None
        assert torch.isfinite(value).all(), f"{name}: not finite at {q}, {r}, {k}"
        assert torch.isfinite(slope).all(), f"{name}: the slope is not finite at {q}, {r}, {k}"


def test_negative_control() -> None:
    """The comparison can fail: the tanh approximation of GELU is not GELU."""
    gelu, tanh = infinite.Gelu(), infinite.Activation(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    gaps = [abs(x - y) for x, y in zip(_dual(gelu, 1.0, 1.0, 0.5), _dual(tanh, 1.0, 1.0, 0.5), strict=True)]
    assert max(gaps) > 1e-6


def test_activation_refuses_what_is_not_elementwise() -> None:
    spec = infinite.Serial(infinite.Dense(), infinite.Activation(lambda x: x.sum(-1)), infinite.Dense())
    with pytest.raises(ValueError, match="elementwise"):
        infinite.kernel(spec, torch.ones(2, 3))
    with pytest.raises(ValueError, match="degree"):
        infinite.Activation(torch.tanh, degree=512, nodes=512)

"""Optimisation against the thing itself: quadratics descended by torch's optimizers, ODEs, explicit JᵀHJ."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch import Tensor

from ntkwatch import metrics

K = torch.tensor([[2.0, 1], [1, 2]]).double()
Y = torch.tensor([[1.0], [0]]).double()
START = torch.zeros(2, 1).double()

OPTIMIZERS = [
    pytest.param({}, id="gradient descent"),
    pytest.param({"momentum": 0.9}, id="heavy ball"),
    pytest.param({"momentum": 0.5}, id="light ball"),
    pytest.param({"momentum": 0.9, "nesterov": True}, id="nesterov"),
    pytest.param({"momentum": 0.9, "dampening": 0.4}, id="dampened"),
]


def descend(mu: float, lr: float, steps: int, **options: object) -> list[float]:
    """|x| along torch.optim.SGD on ½μx² from 1."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=lr, **options)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * mu * x**2).backward()
        optimizer.step()
        path.append(abs(float(x.detach())))
    return path


@pytest.mark.parametrize("options", OPTIMIZERS)
def test_the_largest_stable_rate_parts_convergence_from_divergence(options: dict):
    mu = 0.7
    edge = float(metrics.max_stable_lr(mu, **options))
    assert max(descend(mu, 0.98 * edge, 1500, **options)[-20:]) < 1e-2
    assert max(descend(mu, 1.02 * edge, 1500, **options)[-20:]) > 1e2
    assert float(metrics.stability_ratio(mu, edge, **options)) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize(("side", "stable"), [(0.98, True), (1.02, False)])
def test_adams_threshold_with_a_frozen_preconditioner(side: float, stable: bool):
    beta, mu = 0.9, 1.0
    lr = side * 2 * (1 + beta) / (1 - beta)
    x, m = 1.0, 0.0
    for _ in range(3000):
        m = beta * m + (1 - beta) * mu * x
        x -= lr * m
    assert (abs(x) < 1e-2) is stable
    assert float(metrics.adam_stability_ratio(mu, lr, beta)) == pytest.approx(side)
    assert float(metrics.adam_stability_ratio(mu, lr, beta, step=1)) == pytest.approx(side / (1 - beta))


def test_measured_thresholds():
    assert float(metrics.max_stable_lr(1.0, 0.9)) == pytest.approx(3.80, abs=0.005)
    assert float(metrics.max_stable_lr(1.0, 0.9, nesterov=True)) == pytest.approx(1.355, abs=0.005)
    assert 1 / float(metrics.adam_stability_ratio(1.0, 1.0)) == pytest.approx(37.99, abs=0.02)
    assert float(metrics.max_stable_lr(metrics.eigenvalues(K)[0])) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("options", [o for o in OPTIMIZERS if "dampening" not in o.values[0]])
@pytest.mark.parametrize("lr", [0.005, 0.1, 0.6])
def test_discrete_time_constants_are_those_of_the_envelope(lr: float, options: dict):
    path = np.log(descend(1.0, lr, 400, **options))
    path = np.maximum.accumulate(path[::-1])[::-1]  # the envelope of a ringing error
    tau = float(metrics.discrete_time_constants(1.0, lr, **options))
    steps = int(min(300, 30 * tau))
    start = steps // 3
    assert -(steps - start) / (path[steps] - path[start]) == pytest.approx(tau, rel=0.1)


def test_time_constants_agree_at_small_rates_and_keep_their_digits():
    mu = torch.tensor([1.0, 1e-3, 1e-9, 0.0]).double()
    for momentum in (0.0, 0.9):
        slow = metrics.time_constants(mu, 1e-4, momentum)
        exact = metrics.discrete_time_constants(mu, 1e-4, momentum)
        assert (exact / slow)[1:3].tolist() == pytest.approx([1, 1], rel=1e-5)
        assert slow[3] == exact[3] == math.inf
    assert float(metrics.time_constants(1.0, 0.005)) == 200
    assert float(metrics.discrete_time_constants(1.0, 0.005, 0.9)) == pytest.approx(19.2, abs=0.3)
    assert float(metrics.discrete_time_constants(3.0, 0.9)) == pytest.approx(-1 / math.log(1.7)), "growth is negative"


def test_two_point_flow_and_descent():
    for t, expected in [(0.5, [0.5851695901, 0.1917002498]), (1.0, [0.7911667452, 0.1590461864])]:
        assert metrics.gradient_flow(K, START, Y, t).flatten().tolist() == pytest.approx(expected, abs=5e-11)
    assert metrics.gradient_descent(K, START, Y, 4, lr=0.5).flatten().tolist() == pytest.approx([0.9375, 0], abs=1e-14)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0.0, 3.0))
def test_gradient_flow_solves_its_equation(seed: int, n: int, t: float):
    generator = torch.Generator().manual_seed(seed)
    j, f0, y = (torch.randn(n, c, dtype=torch.float64, generator=generator) for c in (n + 1, 2, 2))
    k = j @ j.T
    flow = solve_ivp(
        lambda _, f: (-0.3 * k.numpy() @ (f.reshape(n, 2) - y.numpy())).ravel(),
        (0, t),
        f0.numpy().ravel(),
        method="DOP853",
        rtol=1e-10,
        atol=1e-12,
    )
    expected = flow.y[:, -1].tolist() if t > 0 else f0.flatten().tolist()
    assert metrics.gradient_flow(k, f0, y, t, lr=0.3).flatten().tolist() == pytest.approx(expected, abs=1e-7)
    f = f0
    for _ in range(5):
        f = f - 0.01 * k @ (f - y)
    assert torch.allclose(metrics.gradient_descent(k, f0, y, 5, lr=0.01), f, rtol=1e-10, atol=1e-10)


def problem(seed: int, n: int = 4, c: int = 3, p: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Jacobian [nC, P], full kernel [n, C, n, C], outputs [n, C]."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.randn(n * c, p, dtype=torch.float64, generator=generator)
    return j, (j @ j.T).reshape(n, c, n, c), torch.randn(n, c, dtype=torch.float64, generator=generator)


def cross_entropy_hessian(outputs: Tensor) -> Tensor:
    p = outputs.softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)


@pytest.mark.parametrize("p", [20, 5], ids=["wide", "narrow"])
def test_gauss_newton_spectrum_is_that_of_the_explicit_matrix(p: int):
    j, theta, outputs = problem(0, p=p)
    hess = cross_entropy_hessian(outputs)
    labels = torch.tensor([0, 1, 2, 0])
    for row, block in zip(outputs, hess, strict=True):
        exact = torch.func.hessian(lambda f: torch.nn.functional.cross_entropy(f[None], labels[:1]))(row) / len(outputs)
        assert torch.allclose(block, exact, atol=1e-15), "the test's own Hessian"
    explicit = np.linalg.eigvalsh((j.T @ torch.block_diag(*hess) @ j).numpy())[::-1]
    spectrum = metrics.gauss_newton_spectrum(theta, hess)
    shared = min(len(explicit), len(spectrum))
    assert spectrum[:shared].tolist() == pytest.approx(explicit[:shared].tolist(), abs=1e-12 * explicit[0])
    assert float(spectrum[shared:].sum()) == pytest.approx(0, abs=1e-12 * explicit[0])
    assert spectrum[0] <= metrics.eigenvalues(theta)[0] / (2 * len(outputs))


def test_gauss_newton_spectrum_of_mse_is_the_kernels_own():
    _, theta, outputs = problem(1)
    hess = (2 / outputs.numel() * torch.eye(3).double()).repeat(4, 1, 1)
    expected = 2 / outputs.numel() * metrics.eigenvalues(theta)
    assert torch.allclose(metrics.gauss_newton_spectrum(theta, hess), expected, rtol=1e-12)


def test_cross_entropy_cannot_see_the_logit_shift_and_its_noise_is_no_error():
    """Θ = 1e6·(logit shift) + a kernel of rank 4: what is left of Θ's rounding, 1e-10, is far above the product's."""
    _, theta, outputs = problem(2, p=4)
    hess = cross_entropy_hessian(outputs)
    spectrum = metrics.gauss_newton_spectrum(1e6 * torch.ones(4, 3, 4, 3).double() + theta, hess)
    assert torch.allclose(spectrum, metrics.gauss_newton_spectrum(theta, hess), atol=1e-8)


def test_the_largest_rate_from_the_spectrum_is_the_real_one():
    """A linear model under nn.MSELoss: the threshold of the whole chain Θ → H → μ_max → rate, by descending it."""
    j, theta, y = problem(3)
    hess = (2 / y.numel() * torch.eye(3).double()).repeat(4, 1, 1)
    edge = float(metrics.max_stable_lr(metrics.gauss_newton_spectrum(theta, hess)[0], momentum=0.9))
    for side, stable in [(0.98, True), (1.02, False)]:
        w = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=side * edge, momentum=0.9)
        for _ in range(1500):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss((j @ w).reshape(y.shape), y)
            loss.backward()
            optimizer.step()
        assert (float(loss.detach()) < 1) is stable, side

"""Lazy or rich: closed forms of the Taylor ratio, and weights' motion against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkwatch import metrics


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_scalar_chain_under_gradient_flow():
    u0, t = 0.01, 5.0
    u = u0 * math.exp(2 * t) / (1 - u0 + u0 * math.exp(2 * t))
    s = math.sqrt(u) - math.sqrt(u0)
    df, linear = (torch.tensor([[v]], dtype=torch.float64) for v in (u - u0, 2 * math.sqrt(u0) * s))
    assert float(metrics.taylor_ratio(df, linear)) == pytest.approx(0.691776659228, abs=5e-13)
    assert float(metrics.linearization_error(df, linear)) == pytest.approx(0.817810856362, abs=5e-13)


@pytest.mark.parametrize(("depth", "s"), [(3, 0.5), (2, 0.5), (4, 1.3)])
def test_shrinking_a_real_relu_net(depth: int, s: float):
    """f(sθ) of a bias-free ReLU net and its tangent by torch.func, against the closed form; 5/19 at L = 3, s = ½."""
    weights = (*(normal(layer, 6, 6) for layer in range(depth - 1)), normal(9, 2, 6))
    x = normal(10, 5, 6)

    def f(*w: Tensor) -> Tensor:
        h = x
        for hidden in w[:-1]:
            h = torch.relu(h @ hidden.T)
        return h @ w[-1].T

    f0, linear = torch.func.jvp(f, weights, tuple((s - 1) * w for w in weights))
    df = f(*(s * w for w in weights)) - f0
    a, b = abs(s**depth - 1), depth * abs(s - 1)
    expected = abs(s**depth - 1 - depth * (s - 1)) / (a + b)
    assert float(metrics.taylor_ratio(df, linear, f0)) == pytest.approx(expected, abs=1e-12)
    if (depth, s) == (3, 0.5):
        assert float(metrics.taylor_ratio(df, linear)) == pytest.approx(5 / 19, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(-100, 100))
def test_taylor_ratio_is_in_range_and_blind_to_output_scale(seed: int, exponent: float):
    df, linear = normal(seed, 4, 2), normal(seed + 1, 4, 2)
    value = float(metrics.taylor_ratio(df, linear))
    assert 0 <= value <= 1
    assert float(metrics.taylor_ratio(10.0**exponent * df, 10.0**exponent * linear)) == pytest.approx(value, rel=1e-12)
    assert float(metrics.taylor_ratio(df, df)) == 0
    assert float(metrics.taylor_ratio(df, -df)) == pytest.approx(1)


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, False), (torch.float64, True)])
def test_motion_below_the_outputs_rounding_is_no_motion(dtype: torch.dtype, moved: bool):
    f = torch.ones(4, 1, dtype=dtype)
    df = torch.full((4, 1), 1e-6).double()
    assert bool(metrics.taylor_ratio(df, df / 2, f).isfinite()) is moved
    assert bool(metrics.taylor_ratio(df, df / 2).isfinite()), "without the outputs only an exact 0 is no motion"


def test_one_step_error_is_proportional_to_the_rate_and_stalls_on_the_wrong_kernel():
    w, x, y = normal(0, 2, 5), normal(1, 4, 5), normal(2, 4, 2)

    def f(w: Tensor) -> Tensor:
        return torch.tanh(x @ w.T)

    jacobian = torch.func.jacrev(f)(w).flatten(2)
    theta = torch.einsum("ncp,mdp->ncmd", jacobian, jacobian)
    grad = 2 * (f(w) - y) / y.numel()
    step = torch.einsum("ncp,nc->p", jacobian, grad).reshape(w.shape)
    errors = [float(metrics.one_step_error(f(w - lr * step) - f(w), theta, grad, lr)) for lr in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)
    trace = torch.einsum("ncmc,de->ndme", theta, torch.eye(2).double()) / 2
    wrong = [float(metrics.one_step_error(f(w - lr * step) - f(w), trace, grad, lr)) for lr in (1e-3, 1e-4)]
    assert min(wrong) > 0.01, "negative control: the trace kernel must not pass"


def test_parameter_distance_pools_its_tensors():
    theta0 = {"w": normal(0, 3, 4), "b": normal(1, 3)}
    theta = {name: value + normal(2, *value.shape) for name, value in theta0.items()}
    flat = [np.concatenate([t[name].numpy().ravel() for name in ("w", "b")]) for t in (theta, theta0)]
    expected = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
    assert float(metrics.parameter_distance(theta, theta0)) == pytest.approx(expected, rel=1e-14)


def test_spectral_update_of_a_convolution_is_that_of_its_matrix():
    w, w0 = normal(0, 4, 3, 2, 2), normal(1, 4, 3, 2, 2)
    expected = np.linalg.norm((w - w0).reshape(4, -1).numpy(), 2) / np.linalg.norm(w0.reshape(4, -1).numpy(), 2)
    assert float(metrics.spectral_update(w, w0)) == pytest.approx(expected, rel=1e-13)


def test_neural_feature_correlation_of_its_definition_and_of_aligned_weights():
    w, w0, g = normal(0, 4, 3), normal(1, 4, 3), normal(2, 6, 2, 3)
    outer = sum(gn.T @ gn for gn in g) / 6
    for start in (None, w0):
        moved = w if start is None else w - start
        weight = moved.T @ moved
        expected = float((weight * outer).sum() / (weight.norm() * outer.norm()))
        assert float(metrics.neural_feature_correlation(w, g, start)) == pytest.approx(expected, abs=1e-14)
    assert float(metrics.neural_feature_correlation(w, w[None].repeat(5, 1, 1))) == pytest.approx(1, abs=1e-14)
    orthogonal = torch.eye(3).double()
    assert float(metrics.neural_feature_correlation(orthogonal[:1], orthogonal[None, 1:2])) == 0

"""Kernel regression against refitting, its own definitions in numpy, and learning curves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from ntkwatch import metrics

RIDGES = [0.0, 1e-6, 0.3, 10.0]


def problem(seed: int, n: int = 7, m: int = 3, c: int = 2, rank: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K [n, n], y [n, C], K_* [m, n], K_** [m, m] of one Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.randn(n + m, rank, dtype=torch.float64, generator=generator)
    y = torch.randn(n, c, dtype=torch.float64, generator=generator)
    k = j @ j.T
    return k[:n, :n], y, k[n:, :n], k[n:, n:]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(RIDGES))
def test_leave_one_out_equals_refitting(seed: int, ridge: float):
    k, y, _, _ = problem(seed)
    for i, residual in enumerate(metrics.loo_residuals(k, y, ridge)):
        keep = [j for j in range(len(k)) if j != i]
        refit = metrics.kernel_regression(k[keep][:, keep], y[keep], k[i : i + 1, keep], ridge)
        assert torch.allclose(residual, y[i] - refit[0], rtol=1e-9, atol=1e-9), f"probe {i}"


def test_leave_one_out_and_gcv_to_twelve_digits():
    k, y, _, _ = problem(0)
    n, ridge = len(k), 0.3
    s = k @ torch.linalg.inv(k + ridge * torch.eye(n).double())
    residual = y - s @ y
    by_definition = residual / (1 - s.diagonal())[:, None]
    assert torch.allclose(metrics.loo_residuals(k, y, ridge), by_definition, rtol=1e-12)
    gcv = residual.square().sum() / n / (1 - s.trace() / n) ** 2
    assert float(metrics.gcv(k, y, ridge)) == pytest.approx(float(gcv), rel=1e-12)
    inverse = torch.linalg.inv(
        k / n + ridge / n * torch.eye(n).double()
    )  # KARE at λ = ridge/n, as Jacot et al. write it
    kare = ((y.T @ inverse @ inverse @ y).trace() / n) / (inverse.trace() / n) ** 2
    assert float(metrics.gcv(k, y, ridge)) == pytest.approx(float(kare), rel=1e-12)


@pytest.mark.parametrize("ridge", RIDGES)
def test_predictions_equal_a_solve_and_ridgeless_ones_interpolate(ridge: float):
    k, y, k_test, _ = problem(1)
    expected = np.linalg.solve((k + ridge * torch.eye(7).double()).numpy(), y.numpy())
    assert torch.allclose(metrics.kernel_regression(k, y, k_test, ridge), k_test @ torch.as_tensor(expected), rtol=1e-8)
    assert torch.allclose(metrics.kernel_regression(k, y, k, ridge), y) is (ridge < 1e-3)


def test_duplicate_probes_are_averaged_without_a_ridge():
    k, y, k_test, _ = problem(2)
    twice = [0, 1, 2, 3, 4, 5, 6, 6]
    target = torch.cat([y, y[6:] + 2])
    middle = y.clone()
    middle[6] += 1
    doubled = metrics.kernel_regression(k[twice][:, twice], target, k_test[:, twice])
    assert torch.allclose(doubled, metrics.kernel_regression(k, middle, k_test), rtol=1e-8)


def test_complexity_of_four_points():
    """H^∞ of the four unit vectors of the ReLU table, whose diagonal is ½ exactly."""
    c = torch.zeros(4, 4, dtype=torch.float64)
    c[0, 2] = c[2, 0] = 0.6
    c[1, 2] = c[2, 1] = 0.8
    h = c * (math.pi - torch.acos(c)) / (2 * math.pi) + torch.eye(4).double() / 2
    y = torch.tensor([1.0, -1, 1, -1])[:, None].double()
    assert metrics.eigenvalues(h).tolist() == pytest.approx([0.881939235341, 0.5, 0.5, 0.118060764659], abs=5e-13)
    assert float(metrics.complexity(h, y)) == pytest.approx(2.5561983693297, abs=5e-13)
    assert float(h.trace()) == pytest.approx(len(h) / 2)


@pytest.mark.parametrize("n", [1, 4, 9.5])
def test_eigenlearning_of_equal_modes(n: float):
    v = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = metrics.eigenlearning(torch.full((10,), 0.3).double(), v, n)
    assert float(curve.error) == pytest.approx((1 - n / 10) * float(v.square().sum()), rel=1e-12)
    assert curve.learnability.tolist() == pytest.approx([n / 10] * 10, rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.5, 8), st.sampled_from([0.0, 0.1, 5.0]))
def test_eigenlearning_solves_its_equations_in_any_order_of_modes(seed: int, n: float, ridge: float):
    generator = torch.Generator().manual_seed(seed)
    modes = torch.rand(9, dtype=torch.float64, generator=generator) + 1e-3
    v = torch.randn(9, 1, dtype=torch.float64, generator=generator)
    lam = modes.numpy()
    kappa = brentq(lambda k: (lam / (lam + k)).sum() + ridge / k - n, 1e-12, 1e4, xtol=1e-15, rtol=1e-14)
    learnability = lam / (lam + kappa)
    error = ((1 - learnability) ** 2 * v.numpy()[:, 0] ** 2).sum() * n / (n - (learnability**2).sum())
    curve = metrics.eigenlearning(modes, v, n, ridge)
    assert float(curve.kappa) == pytest.approx(kappa, rel=1e-9)
    assert curve.learnability.tolist() == pytest.approx(learnability.tolist(), rel=1e-9)
    assert float(curve.error) == pytest.approx(error, rel=1e-9)


def test_eigenlearning_predicts_the_error_of_real_regression():
    """Gaussian features with a power-law spectrum: the mean test error over 200 draws within 10 %."""
    generator = torch.Generator().manual_seed(0)
    modes, n = torch.arange(1, 61).double() ** -1.5, 20
    v = modes.sqrt()[:, None]
    errors = []
    for _ in range(200):
        x = torch.randn(n, 60, dtype=torch.float64, generator=generator)
        features = x * modes.sqrt()
        weights = features.T @ torch.linalg.solve(features @ features.T + 0.05 * torch.eye(n), x @ v)
        errors.append(float((modes.sqrt()[:, None] * weights - v).square().sum()))
    assert np.mean(errors) == pytest.approx(float(metrics.eigenlearning(modes, v, n, 0.05).error), rel=0.1)


def test_gp_posterior_is_the_covariance_of_the_trained_ensemble():
    """f_* − A f with (f, f_*) ~ N(0, S): the map [−A, I] applied to the joint covariance."""
    k, y, k_test, _ = problem(3)
    s, _, s_cross, s_test = problem(4)
    posterior = metrics.gp_posterior(k, y, k_test, s, s_cross, s_test)
    a = (k_test @ torch.linalg.inv(k)).numpy()
    joint = np.block([[s.numpy(), s_cross.numpy().T], [s_cross.numpy(), s_test.numpy()]])
    linear = np.concatenate([-a, np.eye(3)], 1)
    assert np.allclose(posterior.covariance.numpy(), linear @ joint @ linear.T, rtol=1e-9)
    assert np.allclose(posterior.mean.numpy(), a @ y.numpy(), rtol=1e-9)
    assert float(torch.linalg.eigvalsh(posterior.covariance).min()) > -1e-9


def test_gp_posterior_with_theta_proportional_to_s_is_bayes_and_the_one_net_form():
    k, y, k_test, k_test_test = problem(5)
    ensemble = metrics.gp_posterior(3 * k, y, 3 * k_test, k, k_test, k_test_test)
    one_net = metrics.ntkgp_posterior(k, y, k_test, k_test_test)
    assert torch.allclose(ensemble.covariance, one_net.covariance, rtol=1e-9, atol=1e-12)
    assert torch.allclose(ensemble.mean, one_net.mean, rtol=1e-9)
    noisy = metrics.ntkgp_posterior(k, y, k_test, k_test_test, ridge=0.2)
    assert bool((noisy.variance > one_net.variance).all())
    assert torch.allclose(metrics.ntkgp_posterior(k, y, k, k).variance, torch.zeros(7).double(), atol=1e-10)


def test_calibration_against_scipy_and_of_samples_from_the_model_itself():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    variance = torch.rand(4000, dtype=torch.float64, generator=generator) + 0.1
    y = mean + variance.sqrt()[:, None] * torch.randn(4000, 2, dtype=torch.float64, generator=generator)
    expected = -norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt()[:, None].numpy()).mean()
    assert float(metrics.gaussian_nll(mean, variance, y)) == pytest.approx(expected, rel=1e-12)
    for level in (0.5, 0.95):
        inside = np.abs(y.numpy() - mean.numpy()) <= norm.ppf((1 + level) / 2) * variance.sqrt()[:, None].numpy()
        assert float(metrics.coverage(mean, variance, y, level)) == inside.mean()
        assert float(metrics.coverage(mean, variance, y, level)) == pytest.approx(level, abs=0.02)
    assert metrics.coverage(mean, variance / 9, y) < 0.6, "negative control: overconfident by a factor of three"
    assert metrics.gaussian_nll(mean, variance, y) < metrics.gaussian_nll(mean, variance / 9, y)


@pytest.mark.parametrize("outputs", [1, 3])
def test_after_kernel_gain_of_a_kernel_that_learnt_the_classes(outputs: int):
    label = torch.arange(60) % max(outputs, 2)
    y = torch.eye(3).double()[label] if outputs == 3 else (2.0 * label - 1)[:, None].double()
    noise = torch.randn(60, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = noise @ noise.T / 80
    gain = float(metrics.after_kernel_gain(before + y @ y.T, before, y, n_train=30))
    assert gain > 0.3
    assert float(metrics.after_kernel_gain(before, before + y @ y.T, y, n_train=30)) == -gain
    assert float(metrics.after_kernel_gain(9 * before, before, y, n_train=30)) == 0, "growth alone is no gain"


@pytest.mark.parametrize("c", [1, 4])
def test_held_out_probes_that_no_kernel_reaches_are_right_by_chance(c: int):
    """The identity says nothing of them: whatever class comes first among equals would have its share of them right."""
    label = torch.tensor([0, 1, 2, 3] * 3 + [0, 0, 0, 1]) % max(c, 2)
    y = torch.eye(c).double()[label] if c > 1 else 2.0 * label[:, None].double() - 1
    knows, blind = y @ y.T + 0.1 * torch.eye(16), torch.eye(16).double()
    assert float(metrics.after_kernel_gain(knows, blind, y, 12)) == pytest.approx(1 - 1 / max(c, 2))
    assert float(metrics.after_kernel_gain(blind, knows, y, 12)) == pytest.approx(1 / max(c, 2) - 1)


def test_after_kernel_gain_takes_its_ridge_from_each_kernels_own_trace():
    label = torch.arange(200) % 3
    y = torch.eye(3).double()[label]
    j = torch.randn(2, 200, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k, k0 = (a @ a.T + s * y @ y.T for a, s in zip(j, (3.0, 0.5), strict=True))

    def accuracy(k: Tensor, ridge: float) -> float:
        guess = metrics.kernel_regression(k[:60, :60], y[:60], k[60:, :60], ridge * float(k[:60, :60].trace()) / 60)
        return float((guess.argmax(1) == label[60:]).double().mean())

    gains = {ridge: accuracy(k, ridge) - accuracy(k0, ridge) for ridge in (1e-4, 0.3)}
    assert len(set(gains.values())) == 2, "the ridge does not matter here: nothing tested"
    for ridge, gain in gains.items():
        assert float(metrics.after_kernel_gain(k, k0, y, 60, ridge)) == pytest.approx(gain, abs=1e-12)


def test_gp_posterior_is_the_spread_of_sixty_trained_antithetic_pairs():
    """Known answer 3.16: real networks of width 1,024, pairs with the readout's sign flipped."""
    from ntkwatch import infinite

    width, pairs, generator = 1024, 60, torch.Generator().manual_seed(0)
    x = torch.randn(10, 4, generator=generator)
    x = math.sqrt(2) * x / x.norm(dim=1, keepdim=True)
    y = torch.tensor([0.5, 0.8, -0.3, -0.6, 0.2, -0.4])[:, None]
    train, test = slice(0, 6), slice(6, 10)
    w = torch.randn(pairs, width, 4, generator=generator).repeat(2, 1, 1).requires_grad_()
    v = torch.randn(pairs, width, generator=generator)
    v = torch.cat([v, -v]).requires_grad_()

    def f(x: Tensor) -> Tensor:  # [2·pairs, m]
        return torch.einsum("enm,en->em", torch.relu(torch.einsum("end,md->enm", w, x)), v) / math.sqrt(width)

    spec = infinite.Serial(infinite.Dense(2.0, 0.0), infinite.Relu(), infinite.Dense(1.0, 0.0))  # 2/√d is 1 at d = 4
    kernel = infinite.kernel(spec, x.double())
    k, s = kernel.ntk, kernel.nngp
    rate = 1 / float(metrics.eigenvalues(k[train, train])[0])
    for _ in range(400):
        loss = 0.5 * (f(x[train]) - y[:, 0]).square().sum()
        for p, g in zip((w, v), torch.autograd.grad(loss, (w, v)), strict=True):
            p.data -= rate * g
    assert loss < 1e-4, "trained"
    found = f(x[test]).detach().double()
    told = metrics.gp_posterior(
        k[train, train], y.double(), k[test, train], s[train, train], s[test, train], s[test, test]
    )
    assert (found.mean(0) - told.mean[:, 0]).abs().max() < 0.02
    assert (found.std(0) / told.variance.sqrt() - 1).abs().max() < 0.25


def test_leave_one_out_equals_refitting_to_twelve_digits():
    """Known answer 3.14."""
    k, y, _, _ = problem(0)
    for i, residual in enumerate(metrics.loo_residuals(k, y, 0.3)):
        keep = [j for j in range(len(k)) if j != i]
        refit = metrics.kernel_regression(k[keep][:, keep], y[keep], k[i : i + 1, keep], 0.3)
        assert torch.allclose(residual, y[i] - refit[0], rtol=1e-12, atol=1e-12), f"probe {i}"

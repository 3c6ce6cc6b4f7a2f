"""Spectral metrics against known answers, numpy, and the noise floor's two sides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkwatch import metrics

RANKS = ["effective_rank", "participation_ratio", "stable_rank"]


def gram(seed: int, n: int, rank: int | None = None) -> Tensor:
    j = torch.randn(n, rank or n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return j @ j.T


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize(("k", "expected"), [(torch.eye(6), 6), (torch.ones(6, 6), 1)], ids=["identity", "ones"])
def test_all_three_ranks_of_the_identity_and_of_ones(name: str, k: Tensor, expected: float):
    assert float(getattr(metrics, name)(k)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "expected"), list(zip(RANKS, [3.685963610911, 2.907692307692, 1.96875], strict=True)))
def test_ranks_of_a_geometric_spectrum(name: str, expected: float):
    k = torch.diag(2.0 ** -torch.arange(6).double())
    assert float(getattr(metrics, name)(k)) == pytest.approx(expected, abs=5e-13)
    assert float(getattr(metrics, name)(k.diagonal())) == pytest.approx(expected, abs=5e-13), "from eigenvalues"


def test_eigenvalues_of_the_linear_model_and_of_its_full_kernel():
    x = torch.tensor([[1.0, 2, 0], [0, 1, -1], [2, 0, 1]]).double()
    k = x @ x.T + 1
    expected = [9.7409388111524, 4.664874396262113, 0.5941867925854845]
    assert metrics.eigenvalues(k).tolist() == pytest.approx(expected, abs=1e-12)
    theta = torch.einsum("nm,cd->ncmd", k, torch.eye(2).double())
    assert metrics.eigenvalues(theta).tolist() == pytest.approx([e for e in expected for _ in range(2)], abs=1e-12)


def relu_kernels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Analytic NTK of one hidden ReLU layer (c_σ = 2) and H^∞, of unit vectors."""
    c = (x @ x.T).clamp(-1, 1)
    angle = torch.acos(c)
    k0, k1 = (math.pi - angle) / math.pi, ((1 - c**2).sqrt() + c * (math.pi - angle)) / math.pi
    return c * k0 + k1, c * k0 / 2


FOUR_POINTS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0, 0, 1]], dtype=torch.float64)


def test_eigenvalues_of_four_points_under_relu():
    ntk, h = relu_kernels(FOUR_POINTS)
    assert metrics.eigenvalues(ntk).tolist() == pytest.approx(
        [4.131546452330, 1.876335879098, 1.681690113816, 0.310427554756],
        abs=1e-8,  # acos near 1 costs 1.5e-8
    )
    assert metrics.eigenvalues(h).tolist() == pytest.approx([0.881939235341, 0.5, 0.5, 0.118060764659], abs=1e-8)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_condition_number_of_the_deep_relu_limit(n: int):
    k = torch.full((n, n), 0.25).double().fill_diagonal_(1)
    assert float(metrics.condition_number(k)) == pytest.approx((n + 3) / 3, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e9])
def test_centred_stable_rank_does_not_see_the_constant_function(shift: float):
    k = torch.eye(6).double() + shift
    assert float(metrics.stable_rank(k, centered=True)) == pytest.approx(5, rel=1e-5)


def test_decay_exponent_equals_polyfit_over_its_window():
    spectrum = gram(0, 20).diagonal().sort(descending=True).values
    x, y = np.log(np.arange(3, 16)), spectrum[2:15].log().numpy()
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - slope * x - intercept
    assert float(metrics.decay_exponent(spectrum, (3, 15))) == pytest.approx(-slope, abs=1e-12)
    assert float(metrics.decay_r2(spectrum, (3, 15))) == pytest.approx(
        1 - residual @ residual / ((y - y.mean()) @ (y - y.mean())), abs=1e-12
    )


def test_negative_control_an_exponential_spectrum_is_no_power_law():
    power, exponential = torch.arange(1, 31).double() ** -2, torch.exp(-torch.arange(30).double())
    assert metrics.decay_r2(power, (1, 30)) > 1 - 1e-12
    assert metrics.decay_r2(exponential, (1, 30)) < 0.9


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_duplicate_probes_are_counted_as_zero_modes(rank: int):
    k = gram(rank, rank, rank + 3)[torch.arange(10) % rank][:, torch.arange(10) % rank]
    assert float(metrics.numerical_rank(k)) == rank
    assert float(metrics.zero_modes(k)) == 10 - rank
    assert bool(metrics.smallest_eigenvalue(k).isnan())


def test_the_floor_follows_the_dtype_of_the_tensor():
    assert float(metrics.noise_floor(torch.eye(4) * 3)) == pytest.approx(4 * 2**-23 * 3)
    assert float(metrics.noise_floor(torch.eye(4).double() * 3)) == pytest.approx(4 * 2**-52 * 3)


def test_a_kernel_of_float32_factors_needs_its_floor():
    """A float32 Gram of duplicate probes has negative eigenvalues; cast to float64 its noise must be named."""
    j = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)).repeat(8, 1)
    spoiled = (j + 1e-7 * torch.randn(j.shape, generator=torch.Generator().manual_seed(1))) @ j.T
    k = ((spoiled + spoiled.T) / 2).double()
    floor = float(metrics.noise_floor(k.float()))
    assert torch.linalg.eigvalsh(k).min() < -float(metrics.noise_floor(k)), "no noise to test on"
    with pytest.raises(ValueError, match=r"positive semi-definite.*floor="):
        metrics.eigenvalues(k)
    assert float(metrics.numerical_rank(k, floor=floor)) == 4
    assert metrics.eigenvalues(k, floor=floor).min() >= 0
    assert metrics.condition_number(k, floor=floor) < 10, "the zero modes were taken for the smallest eigenvalue"


def test_the_rounding_of_a_gram_is_symmetrised_not_half_ignored():
    k, skew = gram(0, 5), 1e-6 * torch.triu(gram(1, 5), 1)
    assert torch.allclose(metrics.eigenvalues(k + skew - skew.T), metrics.eigenvalues(k), rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 9), st.floats(-100, 100))
def test_spectral_metrics_are_invariant_and_ordered(seed: int, n: int, rank: int, exponent: float):
    k = gram(seed, n, rank)
    rotation = torch.linalg.qr(gram(seed + 1, n)).Q
    turned = rotation @ k @ rotation.T * 10.0**exponent
    for name in RANKS:
        value = getattr(metrics, name)(k)
        assert 1 - 1e-12 <= value <= min(n, rank) + 1e-9, name
        assert float(value) == pytest.approx(float(getattr(metrics, name)(turned)), rel=1e-9), name
    assert metrics.participation_ratio(k) <= metrics.effective_rank(k) + 1e-9, "Rényi entropies fall with their order"
    assert float(metrics.eigenvalues(k).sum()) == pytest.approx(float(k.trace()), rel=1e-12)
    assert metrics.eigenvalues(k).tolist() == pytest.approx(
        np.linalg.eigvalsh(k.numpy())[::-1].clip(0).tolist(), abs=1e-12 * float(k.trace())
    )

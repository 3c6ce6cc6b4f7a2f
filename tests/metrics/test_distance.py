"""Distances between kernels against known answers, and laws that hold for every pair of kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkwatch import metrics

seeds = st.integers(0, 2**31)
sizes = st.integers(3, 9)


def gram(seed: int, n: int, rank: int | None = None) -> Tensor:
    j = torch.randn(n, rank or n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return j @ j.T


def close(a: Tensor, b: Tensor | float, tolerance: float = 1e-10) -> bool:
    return bool(torch.allclose(a, torch.as_tensor(b, dtype=torch.float64), rtol=tolerance, atol=tolerance))


def test_distance_of_identity_and_identity_plus_ones():
    assert close(metrics.kernel_distance(torch.eye(6), torch.eye(6) + 1), 1 / 3, 1e-14)


def test_scalar_chain_doubles_its_kernel_without_turning():
    """f = abx from a = b under gradient flow, u = ab: K = 2u (x = 1), so the motion is growth alone."""
    u0, t = 0.01, 5.0
    u = u0 * math.exp(2 * t) / (1 - u0 + u0 * math.exp(2 * t))
    assert round(u, 10) == 0.9955255179
    k0, k = (torch.tensor([[2 * v]], dtype=torch.float64) for v in (u0, u))
    assert float(metrics.kernel_angle(k, k0)) == 0
    assert close(metrics.kernel_scale(k, k0), 4.600685663461, 1e-12)


def test_scalar_chain_on_two_points_has_one_direction():
    k = torch.tensor([[13.0, -26.0], [-26.0, 52.0]])
    assert close(metrics.kernel_angle(k, torch.tensor([[1.0, -2.0], [-2.0, 4.0]])), 0, 1e-15)


def test_shrinking_a_relu_net_is_scale_without_angle():
    depth, s = 3, 0.5
    k0 = gram(0, 5)
    assert close(metrics.kernel_scale(s ** (2 * (depth - 1)) * k0, k0), -2.772588722240, 1e-12)
    assert close(metrics.kernel_angle(s ** (2 * (depth - 1)) * k0, k0), 0, 1e-15)


@pytest.mark.parametrize("change", [1e-3, 1e-7, 1e-11])
def test_a_small_rotation_keeps_its_digits(change: float):
    """1 − cos(K, K') computed as written is pure rounding below 1e-8; the angle of a perturbation ⊥ I is known."""
    k = torch.eye(4).double()
    k[0, 1] = k[1, 0] = change
    assert close(metrics.kernel_angle(k, torch.eye(4)) / math.atan(change / math.sqrt(2)), 1, 1e-5)
    assert close(metrics.kernel_distance(k, torch.eye(4)) / (change**2 / 4), 1, max(1e-5, change))


def test_cka_is_the_cosine_of_explicitly_centred_kernels():
    k, k0, n = gram(1, 7), gram(2, 7), 7
    c = torch.eye(n).double() - 1 / n
    a, b = c @ k @ c, c @ k0 @ c
    expected = (a * b).sum() / (a.norm() * b.norm())
    assert close(metrics.cka(k, k0), expected, 1e-13)
    assert close(metrics.centered_distance(k, k0), 1 - expected, 1e-13)
    assert close(metrics.center(k), a, 1e-13)


def test_velocity_path_and_directness_on_a_geodesic_and_a_detour():
    def at(angle: float) -> Tensor:
        return math.cos(angle) * torch.eye(2) / math.sqrt(2) + math.sin(angle) * torch.tensor(
            [[1.0, 0], [0, -1]]
        ) / math.sqrt(2)

    path = [at(a).double() for a in (0.0, 0.2, 0.3, 0.6)]
    assert close(metrics.path_length(path), 0.6, 1e-6)
    assert close(metrics.directness(path), 1, 1e-6)
    assert close(metrics.directness([path[0], path[3], path[1]]), 0.2 / 1.0, 1e-6)
    assert close(metrics.kernel_velocity(path[2], path[1], 5), 0.1 / 5, 1e-6)


def test_layer_shares_add_up():
    layers = [gram(s, 4) for s in range(3)]
    assert close(sum(metrics.kernel_share(layer, sum(layers)) for layer in layers), 1, 1e-14)


def test_per_example_motion_finds_the_probe_that_moved():
    k0 = torch.eye(6).double()
    k = k0.clone()
    k[2, 4] = k[4, 2] = 0.5
    motion = metrics.per_example_motion(k, k0)
    assert sorted(motion.topk(2).indices.tolist()) == [2, 4]
    assert close(metrics.per_example_motion(7 * k0, k0), torch.zeros(6), 1e-15)


@settings(deadline=None, max_examples=40)
@given(seeds, seeds, sizes)
def test_relative_change_follows_from_scale_and_angle(a: int, b: int, n: int):
    k, k0 = gram(a, n), gram(b, n)
    r, angle = k.norm() / k0.norm(), metrics.kernel_angle(k, k0)
    assert close(metrics.relative_change(k, k0), ((r - 1) ** 2 + 4 * r * torch.sin(angle / 2) ** 2).sqrt())
    assert close(torch.cos(angle), 1 - metrics.kernel_distance(k, k0))


@settings(deadline=None, max_examples=40)
@given(seeds, seeds, seeds, sizes)
def test_the_angle_is_a_metric_on_directions(a: int, b: int, c: int, n: int):
    x, y, z = gram(a, n), gram(b, n), gram(c, n, 1)
    assert metrics.kernel_angle(x, z) <= metrics.kernel_angle(x, y) + metrics.kernel_angle(y, z) + 1e-12
    assert 0 <= metrics.directness([x, y, z]) <= 1 or bool(metrics.directness([x, y, z]).isnan())


@settings(deadline=None, max_examples=40)
@given(seeds, seeds, sizes, st.integers(1, 4))
def test_ranges_and_symmetry_for_positive_semidefinite_kernels(a: int, b: int, n: int, rank: int):
    k, k0 = gram(a, n, rank), gram(b, n, rank)
    for name, top in [("kernel_distance", 1), ("kernel_angle", math.pi / 2), ("cka", 1), ("centered_distance", 1)]:
        value = getattr(metrics, name)(k, k0)
        assert -1e-15 <= value <= top + 1e-15, name
        assert close(value, getattr(metrics, name)(k0, k), 1e-14), name
    assert close(metrics.kernel_scale(k, k0), -metrics.kernel_scale(k0, k), 1e-14)


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (4, 2, 4, 2)], ids=["trace", "blocks", "full"])
def test_distances_take_every_reduction_by_its_frobenius_norm(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    k, k0 = (torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5 for _ in range(2))
    cosine = (k * k0).sum() / (k.norm() * k0.norm())
    assert close(metrics.kernel_distance(k, k0), 1 - cosine, 1e-13)
    trace = {2: "ii->", 3: "cii->", 4: "icic->"}[k.ndim]
    assert close(metrics.kernel_scale(k, k0), (torch.einsum(trace, k) / torch.einsum(trace, k0)).log(), 1e-13)


def test_negative_control_relative_change_confuses_growth_with_rotation():
    k0 = gram(3, 5)
    assert close(metrics.relative_change(17 * k0, k0), 16)
    assert close(metrics.kernel_angle(17 * k0, k0), 0, 1e-15)


def test_negative_control_the_uncentred_distance_sees_a_constant_shift():
    k0 = gram(4, 5)
    assert metrics.kernel_distance(k0 + 10, k0) > 0.1
    assert close(metrics.centered_distance(k0 + 10, k0), 0, 1e-12)

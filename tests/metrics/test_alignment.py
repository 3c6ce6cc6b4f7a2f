"""Alignment with the targets: known answers, exact permutation moments, class structure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkwatch import metrics

SIGNS = torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None].double()


def gram(seed: int, n: int, rank: int | None = None) -> Tensor:
    j = torch.randn(n, rank or n + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return j @ j.T


def targets(seed: int, n: int, c: int = 2) -> Tensor:
    return torch.randn(n, c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "k", "y", "expected"),
    [
        ("target_alignment", torch.eye(6), SIGNS, 1 / math.sqrt(6)),
        ("centered_alignment", torch.eye(6), SIGNS, 1 / math.sqrt(5)),
        ("target_alignment", torch.eye(6) + SIGNS @ SIGNS.T, SIGNS, 7 / math.sqrt(54)),
        ("target_alignment", torch.ones(6, 6), torch.tensor([1.0, 1, 1, 1, 1, -1])[:, None], 4 / 9),
        ("target_alignment", torch.ones(6, 6), torch.eye(2)[[0, 0, 0, 0, 0, 1]], 26 / (6 * math.sqrt(26))),
    ],
    ids=["KTA(I)", "CKA(I)", "KTA(I+yyT)", "KTA(ones), ±1 at 5:1", "KTA(ones), one-hot at 5:1"],
)
def test_known_alignments(name: str, k: Tensor, y: Tensor, expected: float):
    assert float(getattr(metrics, name)(k, y)) == pytest.approx(expected, abs=1e-14)


def test_centred_alignment_is_the_cka_with_the_target_kernel():
    k, y = gram(0, 8), targets(1, 8, 3)
    assert float(metrics.centered_alignment(k, y)) == pytest.approx(float(metrics.cka(k, y @ y.T)), abs=1e-13)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(3, 9), st.floats(-100, 100))
def test_alignment_is_invariant_and_in_range(seed: int, n: int, exponent: float):
    k, y, scale = gram(seed, n), targets(seed + 1, n), 10.0**exponent
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(targets(seed + 2, 2)).Q
    for name in ("target_alignment", "centered_alignment", "alignment_null_mean"):
        f = getattr(metrics, name)
        value = float(f(k, y))
        assert 0 <= value <= 1 + 1e-14, name
        assert float(f(scale * k, y)) == pytest.approx(value, rel=1e-9), f"{name}: scale of the kernel"
        assert float(f(k, scale * y)) == pytest.approx(value, rel=1e-9), f"{name}: scale of the targets"
        assert float(f(k, y @ turn)) == pytest.approx(value, rel=1e-9), f"{name}: rotation of the outputs"
        assert float(f(k[order][:, order], y[order])) == pytest.approx(value, rel=1e-9), f"{name}: order of the probes"


def test_negative_control_only_the_centred_alignment_ignores_a_shift():
    k, y = gram(0, 6), targets(1, 6)
    assert float(metrics.centered_alignment(k + 5, y + 3)) == pytest.approx(float(metrics.centered_alignment(k, y)))
    assert abs(float(metrics.target_alignment(k + 5, y) - metrics.target_alignment(k, y))) > 0.01
    assert abs(float(metrics.target_alignment(k, y + 3) - metrics.target_alignment(k, y))) > 0.01


def test_null_mean_is_the_mean_over_every_permutation():
    k, y = gram(3, 6), targets(4, 6)
    null = [float(metrics.centered_alignment(k, y[list(p)])) for p in itertools.permutations(range(6))]
    assert float(metrics.alignment_null_mean(k, y)) == pytest.approx(np.mean(null), abs=1e-14)
    exact = (float(metrics.centered_alignment(k, y)) - np.mean(null)) / np.std(null)
    z = metrics.alignment_z(k, y, torch.Generator().manual_seed(0), permutations=20_000)
    assert float(z) == pytest.approx(exact, rel=0.03)


def test_z_is_seeded_leaves_the_global_generator_alone_and_tells_signal_from_noise():
    y = SIGNS.repeat(5, 1)
    k = gram(0, 30) / 30
    state = torch.get_rng_state()
    z = [float(metrics.alignment_z(k + 3 * s * y @ y.T, y, torch.Generator().manual_seed(7))) for s in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert z[0] == z[1]
    assert abs(z[0]) < 4 < z[2]


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e6])
def test_z_is_undefined_where_every_permutation_aligns_alike(shift: float):
    z = metrics.alignment_z(torch.eye(6).double() + shift, SIGNS, torch.Generator().manual_seed(0))
    assert bool(z.isnan()), f"{float(z)} of pure rounding"


def test_class_specialization_equals_its_definition():
    blocks, y = torch.stack([gram(s, 6) for s in range(3)]), torch.eye(3).double()[[0, 1, 2, 0, 1, 1]]
    a = torch.tensor([[float(metrics.cka(k, torch.outer(t, t))) for t in y.T] for k in blocks], dtype=torch.float64)
    assert torch.allclose(metrics.class_specialization(blocks, y), a / a.mean(0), rtol=1e-12)


def test_class_specialization_of_specialised_and_of_shared_kernels():
    y = torch.eye(3).double()[[0, 1, 2, 0, 1, 2]]
    own = torch.stack([torch.outer(t, t) + 0.1 * torch.eye(6) for t in y.T])
    specialised, shared = (
        metrics.class_specialization(own, y),
        metrics.class_specialization(own.mean(0).repeat(3, 1, 1), y),
    )
    assert (specialised.diagonal() > 1.5).all()
    assert torch.allclose(shared, torch.ones(3, 3).double())
    assert torch.allclose(specialised.mean(0), torch.ones(3).double())


def test_an_absent_class_is_nan_in_its_own_column_alone():
    y = torch.eye(3).double()[[0, 1, 0, 1, 0, 1]]
    blocks = torch.stack([gram(s, 6) for s in range(3)])
    assert metrics.class_specialization(blocks, y).isnan().any(0).tolist() == [False, False, True]
    assert "classes [2]" in (metrics.why_undefined("class_specialization", blocks, y) or "")


def test_class_block_fit_against_a_regression_on_indicators():
    k, label = gram(5, 9), torch.tensor([0, 1, 2] * 3)
    fit = metrics.class_block_fit(k, torch.eye(3).double()[label])
    same = label[:, None] == label
    kinds = [torch.eye(9).bool(), same & ~torch.eye(9).bool(), ~same]
    design = np.stack([kind.numpy().ravel().astype(float) for kind in kinds], 1)
    coefficients, residual, *_ = np.linalg.lstsq(design, k.numpy().ravel(), rcond=None)
    assert [float(v) for v in (fit.same_example, fit.same_class, fit.different_class)] == pytest.approx(coefficients)
    assert float(fit.r2) == pytest.approx(1 - residual[0] / float((k - k.mean()).square().sum()))


def test_cumulative_power_against_numpy_and_its_null_over_every_permutation():
    k, y = gram(6, 5), targets(7, 5)
    vectors = np.linalg.eigh(k.numpy())[1][:, ::-1]
    centred = (y - y.mean(0)).numpy()
    power = ((vectors.T @ centred) ** 2).sum(1).cumsum() / (centred**2).sum()
    assert metrics.cumulative_power(k, y).tolist() == pytest.approx(power.tolist(), abs=1e-12)
    null = torch.stack([metrics.cumulative_power(k, y[list(p)]) for p in itertools.permutations(range(5))]).mean(0)
    assert metrics.cumulative_power_null(k).tolist() == pytest.approx(null.tolist(), abs=1e-12)


def test_tied_eigenvalues_share_their_power_whatever_basis_the_solver_takes():
    y = SIGNS[:4] - SIGNS[:4].mean()
    turn = torch.linalg.qr(gram(0, 4)).Q
    spectrum = torch.diag(torch.tensor([3.0, 1, 1, 1]).double())
    k = turn @ spectrum @ turn.T
    first = float((turn[:, 0] @ y) ** 2 / (y.T @ y))
    expected = [first + i * (1 - first) / 3 for i in range(4)]
    assert metrics.cumulative_power(k, y).tolist() == pytest.approx(expected, abs=1e-12)
    assert metrics.cumulative_power(torch.eye(4), y).tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(3, 9), st.integers(1, 9))
def test_cumulative_power_rises_to_one_and_its_summaries_stay_in_range(seed: int, n: int, rank: int):
    power = metrics.cumulative_power(gram(seed, n, rank), targets(seed + 1, n))
    null = metrics.cumulative_power_null(gram(seed, n, rank))
    for curve in (power, null):
        assert bool((curve.diff() >= -1e-14).all())
        assert float(curve[-1]) == pytest.approx(1, abs=1e-12)
        assert 1 / n <= metrics.power_auc(curve) <= 1
        k90 = int(metrics.power_k90(curve))
        assert curve[k90 - 1] >= 0.9 - 1e-12
        assert k90 == 1 or curve[k90 - 2] < 0.9


def test_k90_forgives_the_rounding_of_a_sum():
    curve = torch.full((10,), 0.1).double().cumsum(0)
    curve[8] = 0.9 - 2**-53
    assert float(metrics.power_k90(curve)) == 9
    curve[8] = 0.9 - 1e-9
    assert float(metrics.power_k90(curve)) == 10


def test_power_tells_signal_from_noise():
    y = SIGNS.repeat(5, 1)
    k = gram(0, 30) / 30
    auc = [float(metrics.power_auc(metrics.cumulative_power(k + s * y @ y.T, y))) for s in (0, 1)]
    null = float(metrics.power_auc(metrics.cumulative_power_null(k)))
    assert abs(auc[0] - null) < 0.15
    assert auc[1] > 0.95
    assert float(metrics.power_k90(metrics.cumulative_power(k + y @ y.T, y))) == 1

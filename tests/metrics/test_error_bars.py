"""The jackknife: textbook cases, exactness of its bias correction, and every reduction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ntkwatch import metrics


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_jackknife_of_a_mean_is_the_standard_error_of_the_mean():
    x = draw(0, 12)
    bars = metrics.jackknife(lambda k: k.diagonal().mean(), torch.diag(x))
    assert float(bars.standard_error) == pytest.approx(np.std(x.numpy(), ddof=1) / np.sqrt(12), rel=1e-12)
    assert float(bars.corrected) == pytest.approx(float(x.mean()), rel=1e-12)


def test_bias_correction_turns_the_plug_in_variance_into_the_unbiased_one():
    x = draw(1, 12)
    bars = metrics.jackknife(lambda k: k.diagonal().var(correction=0), torch.diag(x))
    assert float(bars.value) == pytest.approx(np.var(x.numpy()), rel=1e-12)
    assert float(bars.corrected) == pytest.approx(np.var(x.numpy(), ddof=1), rel=1e-12)
    assert float(bars.bias) < 0


def test_a_probe_takes_its_row_column_and_target_with_it():
    j, y = draw(2, 7, 9), draw(3, 7, 2)
    k = j @ j.T
    bars = metrics.jackknife(metrics.centered_alignment, k, rows=[y])
    left = []
    for i in range(7):
        keep = [r for r in range(7) if r != i]
        left.append(float(metrics.centered_alignment(j[keep] @ j[keep].T, y[keep])))
    value = float(metrics.centered_alignment(k, y))
    assert float(bars.corrected) == pytest.approx(7 * value - 6 * np.mean(left), rel=1e-12)
    assert float(bars.standard_error) == pytest.approx(np.sqrt(6 / 7 * ((left - np.mean(left)) ** 2).sum()), rel=1e-10)


@pytest.mark.parametrize("reduction", ["trace", "blocks", "full"])
def test_every_reduction_loses_whole_probes(reduction: str):
    j, j0 = draw(4, 6, 2, 9), draw(5, 6, 2, 9)
    form = {"trace": "ncp,mcp->nm", "blocks": "ncp,mcp->cnm", "full": "ncp,mdp->ncmd"}[reduction]
    bars = metrics.jackknife(metrics.kernel_angle, torch.einsum(form, j, j), torch.einsum(form, j0, j0))
    left = [metrics.kernel_angle(torch.einsum(form, a, a), torch.einsum(form, b, b)) for a, b in without_each(j, j0)]
    assert float(bars.value - bars.corrected) == pytest.approx(
        5 * float(torch.stack(left).mean() - bars.value), rel=1e-9
    )


def without_each(*arrays: Tensor) -> list[tuple[Tensor, ...]]:
    keep = [[r for r in range(len(arrays[0])) if r != i] for i in range(len(arrays[0]))]
    return [tuple(a[rows] for a in arrays) for rows in keep]


def test_a_statistic_of_many_numbers_is_undefined_in_its_own_entries_alone():
    k0 = torch.diag(torch.tensor([0.0, 1, 2, 3]).double())
    bars = metrics.jackknife(lambda k, k0: torch.stack([k.trace(), metrics.kernel_angle(k0, 0 * k)]), k0, k0)
    assert bars.corrected.isnan().tolist() == bars.standard_error.isnan().tolist() == [False, True]
    assert float(bars.value[0]) == 6


def test_the_angles_probe_count_bias_shrinks():
    """The angle of two random-feature kernels is too small from few probes; the jackknife takes most of that off."""
    truth = plain = corrected = 0.0
    for seed in range(12):
        x, w, v = draw(seed, 200, 5), draw(100 + seed, 5, 64), draw(200 + seed, 5, 64)
        h, h0 = torch.relu(x @ (w + 0.7 * v)), torch.relu(x @ w)
        k, k0 = h @ h.T, h0 @ h0.T
        truth += float(metrics.kernel_angle(k, k0))
        few = metrics.jackknife(metrics.kernel_angle, k[:12, :12], k0[:12, :12])
        plain, corrected = plain + float(few.value), corrected + float(few.corrected)
    assert plain < truth
    assert abs(corrected - truth) < 0.6 * abs(plain - truth)

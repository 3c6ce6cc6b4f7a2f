"""What regression and posteriors say of a run, against their formulas in numpy, written out on the kernel it recorded.

Nothing of the library is used but the kernel: solves and inverses of each half, refits without each probe, a root found
by bracketing, a loop over normal densities. Few probes and many outputs, duplicates, low rank, a dominant mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from ntkwatch import Monitor
from tests.diagnostics.test_generalisation import Features

Array = np.ndarray
NAMES = [
    "gcv", "loo_error", "complexity", "holdout_error", "holdout_error_ridgeless", "holdout_accuracy",
    "eigenlearning_error", "ntkgp_nll", "ntkgp_coverage", "after_kernel_gain", "gp_nll", "gp_coverage",
]  # fmt: skip


def inputs(kind: str, n: int) -> Array:
    """Features [n, d], whose Gram matrix is the kernel."""
    x = np.random.default_rng(n).normal(size=(n, n + 7))
    return {
        "generic": x,
        "duplicates": x[np.arange(n) // 2],
        "all alike": x[:1].repeat(n, 0),
        "rank 2": x[:, :2],
        "dominant mean": x + 8,
        "power law": x * (1.0 + np.arange(n + 7)) ** -1.5,
    }[kind]


def halves(n: int, seed: int = 0) -> list[tuple[Array, Array]]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator).numpy() for _ in range(8)]
    return [(order[: n // 2], order[n // 2 :]) for order in orders]


def over_halves(k: Array, y: Array, of: Callable[[Array, Array, Array, Array], float]) -> float:
    """Mean of `of`(weights [m, n/2], training half, held-out half, K of the training half lifted)."""
    found = []
    for a, b in halves(len(k)):
        lifted = k[np.ix_(a, a)] + ridge(k) * np.eye(len(a))
        found.append(of(np.linalg.solve(lifted, k[np.ix_(a, b)]).T, a, b, lifted))
    return float(np.mean(found))


def ridge(k: Array) -> float:
    return 1e-4 * float(np.trace(k)) / len(k)


def loo(k: Array, y: Array) -> float:
    errors = []
    for i in range(len(k)):
        rest = np.delete(np.arange(len(k)), i)
        lifted = k[np.ix_(rest, rest)] + ridge(k) * np.eye(len(rest))
        errors.append(((y[i] - k[i, rest] @ np.linalg.solve(lifted, y[rest])) ** 2).sum())
    return float(np.mean(errors))


def gcv(k: Array, y: Array) -> float:
    inverse = np.linalg.inv(k + ridge(k) * np.eye(len(k)))
    return float(((inverse @ y) ** 2).sum() / len(k) / (np.trace(inverse) / len(k)) ** 2)


def accuracy(guess: Array, y: Array) -> float:
    """A guess that ties between classes, up to rounding, is right by chance."""
    right = []
    for g, target in zip(guess, y, strict=True):
        if len(target) == 1:
            right.append(0.5 if abs(g[0]) < 1e-9 else float(g[0] * target[0] > 0))
        else:
            tied = [c for c in range(len(g)) if max(g) - g[c] <= 1e-9]
            right.append(float(target.argmax() in tied) / len(tied))
    return float(np.mean(right))


def eigenlearning(k: Array, y: Array) -> float:
    n = len(k)
    s, (spectrum, vectors) = n // 2, np.linalg.eigh(k)
    spectrum = np.where(spectrum > 1e-13 * spectrum[-1], spectrum, 0) / n
    gap = lambda u: (spectrum / (spectrum + math.exp(u))).sum() + ridge(k) / math.exp(u) - s  # noqa: E731
    kappa = math.exp(brentq(gap, -100, 60, xtol=1e-14))
    learned, size = spectrum / (spectrum + kappa), ((vectors.T @ y) ** 2).sum(1) / n
    error = ((1 - learned) ** 2 * size).sum() * s / (s - (learned**2).sum())
    return float((n * error - s * (ridge(k) / (s * kappa)) ** 2 * error) / (n - s) / (y**2).sum(1).mean())


def posterior(k: Array, y: Array, kind: str) -> float:
    """A Gaussian process with the prior s·(K + ridge·I), s the likeliest for each training half."""

    def half(w: Array, a: Array, b: Array, lifted: Array) -> float:
        scale = float(np.sum(y[a] * np.linalg.solve(lifted, y[a]))) / y[a].size
        spread = np.array([math.sqrt(scale * (k[i, i] - w[j] @ k[a, i] + ridge(k))) for j, i in enumerate(b)])
        gap = (y[b] - w @ y[a]) / spread[:, None]
        if kind == "nll":
            return float(-np.mean(norm.logpdf(gap) - np.log(spread)[:, None]))
        return float(np.mean(norm.cdf(np.abs(gap)) <= 0.975))

    return over_halves(k, y, half)


def prior(k: Array) -> Array:
    """A covariance of its own, with the kernel's duplicates."""
    return 0.3 + (k / k.diagonal().mean()) ** 2  # products of positive semi-definite entries are so


def ensemble(k: Array, y: Array, kind: str) -> float:
    """Members A·y + (f_0(x) − A·f_0(X)), of which f_0 has the prior's covariance."""
    s = prior(k)

    def half(w: Array, a: Array, b: Array, lifted: Array) -> float:
        members = np.eye(len(k))[b]
        members[:, a] -= w  # what of f_0 a member's prediction holds
        spread = np.sqrt(np.diag(members @ s @ members.T) + 1e-4 * np.trace(s) / len(s))
        gap = (y[b] - w @ y[a]) / spread[:, None]
        if kind == "nll":
            return float(-np.mean(norm.logpdf(gap) - np.log(spread)[:, None]))
        return float(np.mean(norm.cdf(np.abs(gap)) <= 0.975))

    return over_halves(k, y, half)


def ridgeless(k: Array, y: Array) -> float:
    found = []
    for a, b in halves(len(k)):
        inverse = np.linalg.pinv(k[np.ix_(a, a)], rcond=1e-13, hermitian=True)
        found.append(((k[np.ix_(b, a)] @ inverse @ y[a] - y[b]) ** 2).sum(1).mean())
    return float(np.mean(found) / (y**2).sum(1).mean())


def complexity(k: Array, y: Array) -> float:
    shrunk = k * len(k) / 2 / np.trace(k)
    return math.sqrt(2 * float(np.sum(y * np.linalg.solve(shrunk, y))) / len(k))


def naive(k: Array, y: Array) -> dict[str, float]:
    size = (y**2).sum(1).mean()
    return {
        "gcv": gcv(k, y),
        "loo_error": loo(k, y),
        "holdout_error": over_halves(k, y, lambda w, a, b, _: ((w @ y[a] - y[b]) ** 2).sum(1).mean() / size),
        "holdout_error_ridgeless": ridgeless(k, y),
        "holdout_accuracy": over_halves(k, y, lambda w, a, b, _: accuracy(w @ y[a], y[b])),
        "eigenlearning_error": eigenlearning(k, y),
        "ntkgp_nll": posterior(k, y, "nll"),
        "ntkgp_coverage": posterior(k, y, "coverage"),
        "after_kernel_gain": 0.0,
        "gp_nll": ensemble(k, y, "nll"),
        "gp_coverage": ensemble(k, y, "coverage"),
    }


SIZES = [(8, 1), (9, 20), (12, 3), (40, 20), pytest.param(300, 20, marks=pytest.mark.soak)]


def measured(kind: str, n: int, c: int) -> tuple[Any, Array]:
    x = torch.as_tensor(inputs(kind, n))
    labels = torch.arange(n) % max(c, 2)
    y = torch.eye(c).double()[labels] if c > 1 else 2.0 * labels[:, None].double() - 1
    monitor = Monitor(Features(x.shape[1], c), (x, labels), diagnostics=NAMES)
    monitor.nngp = torch.as_tensor(prior((x @ x.T).numpy()))
    return monitor.measure(0), y.numpy()


@pytest.mark.parametrize(("n", "c"), SIZES)
@pytest.mark.parametrize("kind", ["generic", "duplicates", "all alike", "rank 2", "dominant mean", "power law"])
def test_they_are_their_formulas(kind: str, n: int, c: int) -> None:
    found, y = measured(kind, n, c)
    k = found.kernel.numpy()
    expected = naive(k, y)
    if kind in ("duplicates", "all alike", "rank 2"):  # no norm fits: what is under its root is zero but for rounding
        assert "zero modes" in found.reasons["complexity"], kind
    else:
        expected["complexity"] = complexity(k, y)
    for name, value in expected.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), f"{kind}: {name}"


@pytest.mark.parametrize("name", [*NAMES, "complexity_random", "eigenlearning_samples"])
def test_of_a_zero_kernel_and_of_constant_targets_nothing_is_said(name: str) -> None:
    blind = Monitor(Features(4, 3), (torch.zeros(12, 4).double(), torch.arange(12) % 3), diagnostics=[name])
    blind.nngp = torch.eye(12)
    zero = blind.measure(0)
    assert any(part in zero.reasons[name] for part in ("kernel is zero", "trace of the kernel is not positive")), name
    x = torch.as_tensor(inputs("generic", 12))
    for constant in (torch.zeros(12, dtype=torch.long), torch.full((12, 2), 0.1).double()):
        found = Monitor(Features(19, 3), (x, constant), diagnostics=[name]).measure(0)
        assert "targets are constant" in found.reasons[name], name

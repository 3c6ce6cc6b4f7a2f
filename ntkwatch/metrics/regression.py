"""Regression with the kernel as it stands: predictions, leave-one-out, cross-validation, complexity.

`ridge` means K + ridge·I, never rescaled with n. Several outputs share the kernel (Θ taken as K ⊗ I) and sum over C.
`floor` is the noise floor of kernels made from float32 factors, as in `spectrum`: modes at or below it are zero modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntkwatch.metrics.arguments import columns, finite, probe_kernel, real, subject
from ntkwatch.metrics.spectrum import eigensystem
from ntkwatch.metrics.undefined import Undefined, metric, nan

TIE = 1e-9  # of the largest target: outputs that are closer are one up to rounding


def inverse(k: Tensor, ridge: float, floor: float | None, name: str = "k") -> tuple[Tensor, int]:
    """(K + ridge·I)⁺ [n, n], modes at or below the noise floor left out, and how many those are."""
    if not ridge >= 0:
        raise ValueError(f"ridge must be ≥ 0; got {ridge}; pass 0 for the ridgeless limit")
    spectrum, vectors, floor = eigensystem(k, floor, name)
    lifted = spectrum + ridge
    kept = lifted > floor
    weights = torch.where(kept, 1 / lifted, torch.zeros_like(lifted))
    return (vectors * weights) @ vectors.mT, int((~kept).sum())


def _full_rank_inverse(k: Tensor, ridge: float, floor: float | None) -> Tensor:
    inverted, zeros = inverse(k, ridge, floor)
    if zeros:
        raise Undefined(f"the kernel has {zeros} zero modes and the ridge does not lift them")
    return inverted


def cross_rows(k_test: Tensor, n: int, name: str = "k_test") -> Tensor:
    """A finite kernel of test rows against training columns, [m, n]."""
    k_test = real(k_test, name)
    if k_test.ndim != 2 or k_test.shape[1] != n:
        wanted = f"[m, {n}], a row for each test point and a column for each training point"
        raise ValueError(f"{name} must be {wanted}; got shape {tuple(k_test.shape)}; transpose or recompute it")
    return finite(k_test, "the test kernel")


@metric(lambda k_train, y, k_test, *_, **__: nan(k_train).repeat(len(k_test), y.shape[1]))
def kernel_regression(
    k_train: Tensor, y: Tensor, k_test: Tensor, ridge: float = 0.0, *, floor: float | None = None
) -> Tensor:
    """Predictions of regression with the kernel.

    Formula: K_* (K + ridge·I)⁻¹ y; zero modes left out, so ridge = 0 is the least-norm interpolation
    Shape: k_train [n, n], y [n, C], k_test [m, n] (test rows, training columns) -> [m, C]
    Range: (−∞, ∞); undefined where anything is not finite
    Source: Jacot et al. 2018
    Pitfalls: centre the targets or add a bias: the prior mean is 0; ridge is not scaled with n

    >>> k, y = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    >>> kernel_regression(k, y, k).flatten().round(decimals=6)
    tensor([3., 0.], dtype=torch.float64)
    """
    target, rows = columns(y, len(k_train)), cross_rows(k_test, len(k_train))
    return rows @ (inverse(k_train, ridge, floor, "k_train")[0] @ target)


@metric(lambda k, y, *_, **__: nan(k).repeat(y.shape))
def loo_residuals(k: Tensor, y: Tensor, ridge: float, *, floor: float | None = None) -> Tensor:
    """Errors of kernel regression on each probe when it is left out, without refitting.

    Formula: y_i − f_{−i}(x_i) = r_i/(1 − S_ii) = [(K + ridge·I)⁻¹y]_i/[(K + ridge·I)⁻¹]_ii, S = K(K + ridge·I)⁻¹
    Shape: k [n, n], y [n, C] -> [n, C]
    Range: (−∞, ∞); undefined where K + ridge·I is singular at the noise floor
    Source: Wei et al. 2022; the shortcut is exact (Allen 1974)
    Pitfalls: duplicate probes leak their target into the fit

    >>> loo_residuals(torch.eye(2), torch.tensor([[1.0], [2.0]]), ridge=0.5).flatten().round(decimals=6)
    tensor([1., 2.], dtype=torch.float64)
    """
    inverted = _full_rank_inverse(k, ridge, floor)
    return (inverted @ columns(y, len(k))) / inverted.diagonal()[:, None]


@metric()
def gcv(k: Tensor, y: Tensor, ridge: float, *, floor: float | None = None) -> Tensor:
    """Generalised cross-validation: an estimate of the test error of kernel regression from the training probes.

    Formula: (1/n)‖(I − S)y‖²/(1 − tr S/n)², S = K(K + ridge·I)⁻¹; = KARE at λ = ridge/n
    Shape: k [n, n], y [n, C]; sums over C -> []
    Range: [0, ∞); undefined where K + ridge·I is singular at the noise floor
    Source: Wei et al. 2022; Jacot et al. 2020 (KARE)
    Pitfalls: of the mean squared error on points like the probes; ridge is not scaled with n

    >>> round(float(gcv(torch.eye(2), torch.tensor([[1.0], [2.0]]), ridge=0.5)), 6)
    2.5
    """
    inverted = _full_rank_inverse(k, ridge, floor)
    error = inverted @ columns(y, len(k))
    return error.square().sum() / len(k) / (inverted.trace() / len(k)).square()


@metric()
def complexity(k: Tensor, y: Tensor, *, floor: float | None = None) -> Tensor:
    """How much norm the kernel needs to fit the targets.

    Formula: √(2·tr(yᵀK⁻¹y)/n), K as given
    Shape: k [n, n], y [n, C]; sums over C -> []
    Range: [0, ∞); undefined where K has zero modes
    Source: Arora et al. 2019b, a bound for H^∞ (trace n/2 at unit inputs) alone
    Pitfalls: a complexity, not a bound, for any other kernel; scale K to trace n/2 and print random labels beside it

    >>> round(float(complexity(torch.eye(4) / 2, torch.ones(4, 1))), 12)
    2.0
    """
    target = columns(y, len(k))
    return (2 / len(k) * (target * (_full_rank_inverse(k, 0.0, floor) @ target)).sum().clamp(min=0)).sqrt()


@metric()
def after_kernel_gain(k: Tensor, k0: Tensor, y: Tensor, n_train: int, relative_ridge: float = 1e-4) -> Tensor:
    """How much better the kernel after training classifies than the one before it, both held out.

    Formula: accuracy(K_t) − accuracy(K_0) of ridge regression from the first n_train probes to the others, with
        ridge = relative_ridge·tr K/n_train each; classes by argmax over C, by sign for C = 1, a tie by its share
    Shape: k, k0 [n, n] over training probes followed by held-out ones, y [n, C] -> []
    Range: [−1, 1]; undefined where a kernel is not finite
    Source: Long 2021; Vyas et al. 2022
    Pitfalls: quality, not strength: a saturated task shows nothing; known to 1/√(held-out probes)

    >>> y = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    >>> float(after_kernel_gain(y @ y.T, -y @ y.T + 2 * torch.eye(4), y, n_train=2))
    1.0
    """
    if not (0 < n_train < len(k) and relative_ridge > 0):
        got = f"n_train = {n_train} of {len(k)} probes, relative_ridge = {relative_ridge}"
        raise ValueError(f"n_train must leave probes to both sides and relative_ridge be > 0; got {got}; pass such")
    target = columns(y, len(k))

    def accuracy(kernel: Tensor, name: str) -> Tensor:
        kernel = probe_kernel(kernel, name)
        train, held_out = kernel[:n_train, :n_train], kernel[n_train:, :n_train]
        if train.trace() <= 0:
            raise Undefined(f"the trace of {subject(name)} is not positive")
        ridge = relative_ridge * train.trace() / n_train * torch.eye(n_train, dtype=train.dtype, device=train.device)
        guess = held_out @ torch.linalg.solve(train + ridge, target[:n_train])
        return right_classes(guess, target[n_train:])

    return accuracy(k, "k") - accuracy(k0, "k0")


def right_classes(guess: Tensor, y: Tensor) -> Tensor:
    """Share of m guesses [m, C] whose class is that of the targets [m, C], by argmax, by sign for C = 1.

    What ties up to rounding, as where a probe has no kernel with any other, is right by its share of the tied classes.
    """
    if y.shape[1] == 1:
        guess, y = torch.cat([-guess, guess], 1), torch.cat([-y, y], 1)
    tied = guess >= guess.amax(1, keepdim=True) - TIE * y.abs().max()
    own = tied.gather(1, y.argmax(1, keepdim=True))[:, 0]
    return (own.double() / tied.sum(1)).mean()

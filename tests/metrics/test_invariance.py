"""What a metric must not depend on: the order of probes, units, the basis of outputs, probes that see nothing.

Each law gives two numbers (or tensors) that must be one, for every draw; the controls are changes that must be
seen, so that a metric that is constant fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntkwatch import metrics

N, C = 7, 3
Pair = tuple[Tensor, Tensor]


class Draw:
    """Kernels, targets and transformations of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.k, self.k0, self.s = self.gram(N), self.gram(N), self.gram(N)
        self.y, self.f0 = self.normal(N, C), self.normal(N, C)
        self.blocks = torch.stack([self.gram(N) for _ in range(C)])
        self.theta = self.gram(N * C).reshape(N, C, N, C)
        self.order = torch.randperm(N, generator=self.generator)
        self.probes, self.outputs = (torch.linalg.qr(self.normal(m, m)).Q for m in (N, C))
        self.unit = 10.0 ** float(torch.rand((), generator=self.generator, dtype=torch.float64) * 60 - 30)
        self.ridge = float(torch.rand((), generator=self.generator, dtype=torch.float64)) + 0.05
        self.labels = torch.eye(C).double()[torch.arange(N) % C]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def gram(self, m: int) -> Tensor:
        j = self.normal(m, m + 3)
        return j @ j.T

    def reordered(self, k: Tensor) -> Tensor:
        return k[..., self.order, :][..., self.order]

    def turned(self, k: Tensor) -> Tensor:
        return self.probes @ k @ self.probes.T


def padded(k: Tensor, by: int = 2) -> Tensor:
    """With probes that no parameter moves: zero modes."""
    return torch.nn.functional.pad(k, (0, by, 0, by))


def taller(y: Tensor, by: int = 2) -> Tensor:
    return torch.nn.functional.pad(y, (0, 0, 0, by))


PAIR = ("kernel_distance", "kernel_angle", "kernel_scale", "relative_change", "cka", "centered_distance")
CENTRED = {"cka", "centered_distance"}  # these know which direction is the constant function
SPECTRAL = ("effective_rank", "participation_ratio", "stable_rank", "condition_number", "numerical_rank")
ALIGNED = ("target_alignment", "centered_alignment", "alignment_null_mean", "cumulative_power")
LAWS: dict[str, Callable[[Draw], tuple[Any, Any]]] = {}


def law(name: str, pair: Callable[[Draw], tuple[Any, Any]]) -> None:
    LAWS[name] = pair


for _name in PAIR:
    f = getattr(metrics, _name)
    law(f"{_name}: order of probes", lambda d, f=f: (f(d.k, d.k0), f(d.reordered(d.k), d.reordered(d.k0))))
    law(f"{_name}: unit of both", lambda d, f=f: (f(d.k, d.k0), f(d.unit * d.k, d.unit * d.k0)))
    if _name not in ("kernel_scale", "relative_change"):
        law(f"{_name}: unit of one", lambda d, f=f: (f(d.k, d.k0), f(d.unit * d.k, d.k0)))
        law(f"{_name}: symmetric", lambda d, f=f: (f(d.k, d.k0), f(d.k0, d.k)))
    if _name not in CENTRED:
        law(f"{_name}: rotation of probes", lambda d, f=f: (f(d.k, d.k0), f(d.turned(d.k), d.turned(d.k0))))
        law(f"{_name}: zero modes", lambda d, f=f: (f(d.k, d.k0), f(padded(d.k), padded(d.k0))))
    else:
        law(f"{_name}: a constant", lambda d, f=f: (f(d.k, d.k0), f(d.k + 3, d.k0)))
for _name in SPECTRAL:
    f = getattr(metrics, _name)
    law(f"{_name}: rotation of probes", lambda d, f=f: (f(d.k), f(d.turned(d.k))))
    law(f"{_name}: unit", lambda d, f=f: (f(d.k), f(d.unit * d.k)))
    law(f"{_name}: zero modes", lambda d, f=f: (f(d.k), f(padded(d.k))))
for _name in ALIGNED:
    f = getattr(metrics, _name)
    law(f"{_name}: order of probes", lambda d, f=f: (f(d.k, d.y), f(d.reordered(d.k), d.y[d.order])))
    law(f"{_name}: unit of the kernel", lambda d, f=f: (f(d.k, d.y), f(d.unit * d.k, d.y)))
    law(f"{_name}: unit of the targets", lambda d, f=f: (f(d.k, d.y), f(d.k, d.unit * d.y)))
    law(f"{_name}: rotation of outputs", lambda d, f=f: (f(d.k, d.y), f(d.k, d.y @ d.outputs)))
    if _name != "target_alignment":
        law(f"{_name}: mean of the targets", lambda d, f=f: (f(d.k, d.y), f(d.k, d.y + 2)))

LAWS |= {
    "kernel_scale: antisymmetric": lambda d: (metrics.kernel_scale(d.k, d.k0), -metrics.kernel_scale(d.k0, d.k)),
    "kernel_scale: the log of a growth": lambda d: (metrics.kernel_scale(d.unit * d.k, d.k), math.log(d.unit)),
    "relative_change: of growth alone": lambda d: (metrics.relative_change(3 * d.k, d.k), 2.0),
    "kernel_velocity: angle over steps": lambda d: (
        5 * metrics.kernel_velocity(d.k, d.k0, 5),
        metrics.kernel_angle(d.k, d.k0),
    ),
    "path_length: a detour is longer by its parts": lambda d: (
        metrics.path_length([d.k0, d.k, d.s]),
        metrics.kernel_angle(d.k, d.k0) + metrics.kernel_angle(d.s, d.k),
    ),
    "directness: unit": lambda d: (
        metrics.directness([d.k0, d.k, d.s]),
        metrics.directness([d.unit * k for k in (d.k0, d.k, d.s)]),
    ),
    "per_example_motion: order of probes": lambda d: (
        metrics.per_example_motion(d.k, d.k0)[d.order],
        metrics.per_example_motion(d.reordered(d.k), d.reordered(d.k0)),
    ),
    "per_example_motion: unit of either": lambda d: (
        metrics.per_example_motion(d.k, d.k0),
        metrics.per_example_motion(d.unit * d.k, d.k0 / d.unit),
    ),
    "kernel_share: layers add up": lambda d: (
        sum(metrics.kernel_share(b, d.blocks.sum(0)) for b in d.blocks),
        1.0,
    ),
    "center: twice is once": lambda d: (metrics.center(metrics.center(d.k)), metrics.center(d.k)),
    "eigenvalues: rotation of probes": lambda d: (metrics.eigenvalues(d.k), metrics.eigenvalues(d.turned(d.k))),
    "smallest_eigenvalue: a unit is a factor": lambda d: (
        metrics.smallest_eigenvalue(d.unit * d.k) / d.unit,
        metrics.smallest_eigenvalue(d.k),
    ),
    "zero_modes: padding is counted": lambda d: (metrics.zero_modes(padded(d.k, 3)), 3 + metrics.zero_modes(d.k)),
    "decay_exponent: unit": lambda d: (
        metrics.decay_exponent(d.k, (1, 6)),
        metrics.decay_exponent(d.unit * d.k, (1, 6)),
    ),
    "decay_r2: rotation of probes": lambda d: (
        metrics.decay_r2(d.k, (1, 6)),
        metrics.decay_r2(d.turned(d.k), (1, 6)),
    ),
    "target_alignment: zero modes": lambda d: (
        metrics.target_alignment(d.k, d.y),
        metrics.target_alignment(padded(d.k), taller(d.y)),
    ),
    "alignment_z: unit": lambda d: (
        metrics.alignment_z(d.k, d.y, torch.Generator().manual_seed(1)),
        metrics.alignment_z(d.unit * d.k, d.unit * d.y, torch.Generator().manual_seed(1)),
    ),
    "class_specialization: each output's own unit": lambda d: (
        metrics.class_specialization(d.blocks, d.labels),
        metrics.class_specialization(d.blocks * torch.tensor([2.0, 1e-3, 50.0])[:, None, None], d.labels),
    ),
    "class_specialization: names of classes": lambda d: (
        metrics.class_specialization(d.blocks, d.labels)[[2, 0, 1]][:, [2, 0, 1]],
        metrics.class_specialization(d.blocks[[2, 0, 1]], d.labels[:, [2, 0, 1]]),
    ),
    "class_specialization: order of probes": lambda d: (
        metrics.class_specialization(d.blocks, d.labels),
        metrics.class_specialization(d.reordered(d.blocks), d.labels[d.order]),
    ),
    "class_block_fit: order of probes and names": lambda d: (
        metrics.class_block_fit(d.k, d.labels).r2,
        metrics.class_block_fit(d.reordered(d.k), d.labels[d.order][:, [1, 2, 0]]).r2,
    ),
    "class_block_fit: unit": lambda d: (
        metrics.class_block_fit(d.k, d.labels).r2,
        metrics.class_block_fit(d.unit * d.k, d.labels).r2,
    ),
    "taylor_ratio: unit and basis of outputs": lambda d: (
        metrics.taylor_ratio(d.y, d.f0),
        metrics.taylor_ratio(d.unit * d.y @ d.outputs, d.unit * d.f0 @ d.outputs),
    ),
    "taylor_ratio: symmetric": lambda d: (metrics.taylor_ratio(d.y, d.f0), metrics.taylor_ratio(d.f0, d.y)),
    "linearization_error: unit": lambda d: (
        metrics.linearization_error(d.y, d.f0),
        metrics.linearization_error(d.unit * d.y, d.unit * d.f0),
    ),
    "one_step_error: a unit of the outputs": lambda d: (
        metrics.one_step_error(d.y, d.theta, d.f0, 0.1),
        metrics.one_step_error(7 * d.y, 49 * d.theta, d.f0 / 7, 0.1),
    ),
    "parameter_distance: unit": lambda d: (
        metrics.parameter_distance({"w": d.k, "b": d.y}, {"w": d.k0, "b": d.f0}),
        metrics.parameter_distance(
            {"w": d.unit * d.k, "b": d.unit * d.y}, {"w": d.unit * d.k0, "b": d.unit * d.f0}
        ),
    ),
    "spectral_update: rotation of both sides": lambda d: (
        metrics.spectral_update(d.y, d.f0),
        metrics.spectral_update(d.probes @ d.y @ d.outputs, d.probes @ d.f0 @ d.outputs),
    ),
    "spectral_update: unit": lambda d: (
        metrics.spectral_update(d.y, d.f0),
        metrics.spectral_update(d.unit * d.y, d.unit * d.f0),
    ),
    "neural_feature_correlation: rotation of the layer's input, units": lambda d: (
        metrics.neural_feature_correlation(d.y, d.normal_gradients),
        metrics.neural_feature_correlation(d.unit * d.y @ d.outputs, d.normal_gradients @ d.outputs / d.unit),
    ),
    "gradient_flow: order of probes": lambda d: (
        metrics.gradient_flow(d.k, d.f0, d.y, 0.3)[d.order],
        metrics.gradient_flow(d.reordered(d.k), d.f0[d.order], d.y[d.order], 0.3),
    ),
    "gradient_flow: basis of outputs": lambda d: (
        metrics.gradient_flow(d.k, d.f0, d.y, 0.3) @ d.outputs,
        metrics.gradient_flow(d.k, d.f0 @ d.outputs, d.y @ d.outputs, 0.3),
    ),
    "gradient_flow: unit of time": lambda d: (
        metrics.gradient_flow(d.k, d.f0, d.y, 0.3),
        metrics.gradient_flow(d.unit * d.k, d.f0, d.y, 0.3 / d.unit),
    ),
    "gradient_flow: a flow is its parts": lambda d: (
        metrics.gradient_flow(d.k, d.f0, d.y, 0.3),
        metrics.gradient_flow(d.k, metrics.gradient_flow(d.k, d.f0, d.y, 0.1), d.y, 0.2),
    ),
    "gradient_descent: steps are their parts": lambda d: (
        metrics.gradient_descent(d.k, d.f0, d.y, 5, 0.01),
        metrics.gradient_descent(d.k, metrics.gradient_descent(d.k, d.f0, d.y, 2, 0.01), d.y, 3, 0.01),
    ),
    "gauss_newton_spectrum: basis of outputs": lambda d: (
        metrics.gauss_newton_spectrum(d.theta, d.hessian),
        metrics.gauss_newton_spectrum(
            torch.einsum("ncmd,ce,df->nemf", d.theta, d.outputs, d.outputs),
            torch.einsum("ncd,ce,df->nef", d.hessian, d.outputs, d.outputs),
        ),
    ),
    "stability_ratio: a share of the largest rate": lambda d: (
        metrics.stability_ratio(d.ridge, 0.3, 0.9) * metrics.max_stable_lr(d.ridge, 0.9),
        0.3,
    ),
    "time_constants: unit of time": lambda d: (
        metrics.time_constants(d.unit * 2.0, 0.1 / d.unit),
        metrics.time_constants(2.0, 0.1),
    ),
    "kernel_regression: order of training probes": lambda d: (
        metrics.kernel_regression(d.k, d.y, d.k0, d.ridge),
        metrics.kernel_regression(d.reordered(d.k), d.y[d.order], d.k0[:, d.order], d.ridge),
    ),
    "kernel_regression: units of kernel and targets": lambda d: (
        3 * metrics.kernel_regression(d.k, d.y, d.k0, d.ridge),
        metrics.kernel_regression(d.unit * d.k, 3 * d.y, d.unit * d.k0, d.unit * d.ridge),
    ),
    "loo_residuals: order of probes": lambda d: (
        metrics.loo_residuals(d.k, d.y, d.ridge)[d.order],
        metrics.loo_residuals(d.reordered(d.k), d.y[d.order], d.ridge),
    ),
    "gcv: basis of outputs, unit of kernel and ridge": lambda d: (
        metrics.gcv(d.k, d.y, d.ridge),
        metrics.gcv(d.unit * d.k, d.y @ d.outputs, d.unit * d.ridge),
    ),
    "gcv: rotation of probes": lambda d: (
        metrics.gcv(d.k, d.y, d.ridge),
        metrics.gcv(d.turned(d.k), d.probes @ d.y, d.ridge),
    ),
    "complexity: a unit of the kernel is an inverse root": lambda d: (
        metrics.complexity(d.k, d.y),
        math.sqrt(d.unit) * metrics.complexity(d.unit * d.k, d.y @ d.outputs),
    ),
    "complexity: rotation of probes": lambda d: (
        metrics.complexity(d.k, d.y),
        metrics.complexity(d.turned(d.k), d.probes @ d.y),
    ),
    "eigenlearning: unit of spectrum and ridge": lambda d: (
        metrics.eigenlearning(d.k.diagonal(), d.y, 3, d.ridge).error,
        metrics.eigenlearning(d.unit * d.k.diagonal(), d.y @ d.outputs, 3, d.unit * d.ridge).error,
    ),
    "learning_curve: order of probes, units, basis of outputs": lambda d: (
        metrics.learning_curve(d.k, d.y, [1, 2.5, 5], d.ridge),
        metrics.learning_curve(d.unit * d.reordered(d.k), d.y[d.order] @ d.outputs, [1, 2.5, 5], d.unit * d.ridge),
    ),
    "gp_posterior: the tangent kernel's unit cancels": lambda d: (
        metrics.gp_posterior(d.k, d.y, d.k0, d.s, d.s, d.s).covariance,
        metrics.gp_posterior(d.unit * d.k, d.y, d.unit * d.k0, d.s, d.s, d.s).covariance,
    ),
    "ntkgp_posterior: its unit is the covariance's": lambda d: (
        metrics.ntkgp_posterior(d.k, d.y, d.k0, d.s, d.ridge).covariance * 5,
        metrics.ntkgp_posterior(5 * d.k, d.y, 5 * d.k0, 5 * d.s, 5 * d.ridge).covariance,
    ),
    "gaussian_nll: a unit adds its log": lambda d: (
        metrics.gaussian_nll(d.f0, d.k.diagonal(), d.y) + math.log(4),
        metrics.gaussian_nll(4 * d.f0, 16 * d.k.diagonal(), 4 * d.y),
    ),
    "coverage: unit": lambda d: (
        metrics.coverage(d.f0, d.k.diagonal(), d.y),
        metrics.coverage(d.unit * d.f0, d.unit**2 * d.k.diagonal(), d.unit * d.y),
    ),
    "after_kernel_gain: units, and antisymmetric": lambda d: (
        metrics.after_kernel_gain(d.k, d.k0, d.labels, 4),
        -metrics.after_kernel_gain(d.unit * d.k0, d.k / d.unit, d.labels, 4),
    ),
    "jackknife: order of probes": lambda d: (
        metrics.jackknife(metrics.kernel_angle, d.k, d.k0).standard_error,
        metrics.jackknife(metrics.kernel_angle, d.reordered(d.k), d.reordered(d.k0)).standard_error,
    ),
    "asymmetry: unit and order of probes": lambda d: (
        metrics.asymmetry(d.mixed),
        metrics.asymmetry(d.unit * d.reordered(d.mixed)),
    ),
    "asymmetry: rotation of probes": lambda d: (metrics.asymmetry(d.mixed), metrics.asymmetry(d.turned(d.mixed))),
    "softmax_centred: a function that all outputs share": lambda d: (
        metrics.softmax_centred(d.theta),
        metrics.softmax_centred(shared(d, d.theta)),
    ),
    "softmax_centred: twice is once": lambda d: (
        metrics.softmax_centred(metrics.softmax_centred(d.theta)),
        metrics.softmax_centred(d.theta),
    ),
    "softmax_centred: its mean block is the trace kernel minus 1/C of the sum kernel": lambda d: (
        torch.einsum("ncmc->nm", metrics.softmax_centred(d.theta)) / C,
        (torch.einsum("ncmc->nm", d.theta) - torch.einsum("ncmd->nm", d.theta) / C) / C,
    ),
    "softmax_centred: names of classes": lambda d: (
        metrics.softmax_centred(d.theta)[:, [2, 0, 1]][..., [2, 0, 1]],
        metrics.softmax_centred(d.theta[:, [2, 0, 1]][..., [2, 0, 1]]),
    ),
    "softmax_share: of the traces": lambda d: (
        metrics.softmax_share(d.theta),
        trace(metrics.softmax_centred(d.theta)) / trace(d.theta),
    ),
    "softmax_share: unit": lambda d: (metrics.softmax_share(d.theta), metrics.softmax_share(d.unit * d.theta)),
    "power_auc: a target along the top mode": lambda d: (
        metrics.power_auc(metrics.cumulative_power(d.top, d.along)),
        1.0,
    ),
}  # fmt: skip


def trace(theta: Tensor) -> Tensor:
    return torch.einsum("ncnc->", theta)


def shared(d: Draw, theta: Tensor) -> Tensor:
    """The kernel of f_c + g: J_c gets a row that is the same for every output, of old parameters and of new ones."""
    j = torch.linalg.cholesky(theta.reshape(N * C, N * C)).reshape(N, C, -1)
    j = torch.cat([j + d.normal(N, 1, N * C), 3 * d.normal(N, 1, 5).expand(N, C, 5)], 2)
    return torch.einsum("ncp,mdp->ncmd", j, j)


class Full(Draw):
    """With what only some laws need."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.normal_gradients = self.normal(5, 2, C)
        h = self.normal(N, C, C + 1)
        self.hessian = h @ h.mT / N
        self.mixed = self.k + self.normal(N, N)
        self.along = self.y[:, :1] - self.y[:, :1].mean()
        self.top = torch.eye(N).double() + 50 * self.along @ self.along.T


@pytest.mark.parametrize("name", LAWS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_law(name: str, seed: int) -> None:
    one, other = (torch.as_tensor(v, dtype=torch.float64) for v in LAWS[name](Full(seed)))
    assert bool(one.isfinite().all()), f"{name}: undefined"
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9, msg=lambda m: f"{name}, seed {seed}: {m}")


def test_the_laws_are_about_every_metric() -> None:
    import inspect

    tried = {name.partition(":")[0] for name in LAWS}
    public = {n for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n)) and n != "why_undefined"}
    without = {  # functions of numbers alone, or of what a law above is made of
        "adam_stability_ratio", "discrete_time_constants", "max_stable_lr", "noise_floor", "cumulative_power_null",
        "power_k90",
    }  # fmt: skip
    assert public - tried == without


SEEN: dict[str, Callable[[Full], Pair]] = {
    "kernel_angle, another kernel": lambda d: (metrics.kernel_angle(d.k, d.k0), metrics.kernel_angle(d.k, d.s)),
    "effective_rank, another spectrum": lambda d: (metrics.effective_rank(d.k), metrics.effective_rank(d.k @ d.k)),
    "centered_alignment, shuffled targets": lambda d: (
        metrics.centered_alignment(d.k, d.y),
        metrics.centered_alignment(d.k, d.y.roll(1, 0)),
    ),
    "taylor_ratio, another direction": lambda d: (metrics.taylor_ratio(d.y, d.f0), metrics.taylor_ratio(d.y, d.f0 * 2)),
    "softmax_centred, a function of one output": lambda d: (
        metrics.softmax_centred(d.theta),
        metrics.softmax_centred(d.theta + torch.einsum("nm,c,d->ncmd", d.k, *[torch.eye(C).double()[0]] * 2)),
    ),
    "asymmetry, a symmetric part": lambda d: (metrics.asymmetry(d.mixed), metrics.asymmetry(d.mixed + d.k)),
    "gcv, another ridge": lambda d: (metrics.gcv(d.k, d.y, d.ridge), metrics.gcv(d.k, d.y, 3 * d.ridge)),
    "learning_curve, another target": lambda d: (
        metrics.learning_curve(d.k, d.y, [3], d.ridge),
        metrics.learning_curve(d.k, d.f0, [3], d.ridge),
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_negative_control_what_must_be_seen_is_seen(name: str) -> None:
    one, other = SEEN[name](Full(3))
    assert (one - other).abs().max() > 1e-3, name

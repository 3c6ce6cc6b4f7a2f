"""What holds for every metric: types, purity, a docstring to print, NaN with its reason, plain errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ntkwatch import metrics

NAMES = [name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name)) and name != "why_undefined"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed: int, n: int = 6) -> Tensor:
    j = normal(seed, n, n + 3)
    return j @ j.T


K, K0, Y = gram(0), gram(1), torch.tensor([[1.0], [1], [-1], [-1], [1], [-1]]).double()
BLOCKS, ONE_HOT = torch.stack([K, K0]), torch.eye(2).double()[[0, 0, 1, 1, 0, 1]]
THETA = torch.einsum("nm,cd->ncmd", K, torch.eye(2).double())
HESS = torch.eye(2).double().repeat(6, 1, 1) / 12
ZERO, ONES, NAN_K = torch.zeros(6, 6).double(), torch.ones(6, 6).double(), torch.full((6, 6), torch.nan).double()
CONSTANT = torch.ones(6, 1).double()
CURVE = torch.linspace(0.1, 1, 6).double()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# One defined call of every metric.
DEFINED: dict[str, tuple[Any, ...]] = {
    "adam_stability_ratio": (1.0, 0.1),
    "after_kernel_gain": (K, K0, Y, 4),
    "alignment_null_mean": (K, Y),
    "alignment_z": (K, Y, seeded()),
    "asymmetry": (K,),
    "center": (K,),
    "centered_alignment": (K, Y),
    "centered_distance": (K, K0),
    "cka": (K, K0),
    "class_block_fit": (K, Y),
    "class_specialization": (BLOCKS, ONE_HOT),
    "complexity": (K, Y),
    "condition_number": (K,),
    "coverage": (Y, K.diagonal(), 0 * Y),
    "cumulative_power": (K, Y),
    "cumulative_power_null": (K,),
    "decay_exponent": (K, (1, 5)),
    "decay_r2": (K, (1, 5)),
    "directness": ([K, K0, gram(2)],),
    "discrete_time_constants": (1.0, 0.1),
    "effective_rank": (K,),
    "eigenlearning": (CURVE, CURVE[:, None], 3),
    "eigenvalues": (K,),
    "gauss_newton_spectrum": (THETA, HESS),
    "gaussian_nll": (Y, K.diagonal(), 0 * Y),
    "gcv": (K, Y, 0.1),
    "gp_posterior": (K, Y, K0, K, K0, K),
    "gradient_descent": (K, 0 * Y, Y, 3, 0.01),
    "gradient_flow": (K, 0 * Y, Y, 3.0, 0.01),
    "jackknife": (metrics.kernel_angle, K, K0),
    "kernel_angle": (K, K0),
    "kernel_distance": (K, K0),
    "kernel_regression": (K, Y, K0),
    "kernel_scale": (K, K0),
    "kernel_share": (K, K0 + K),
    "kernel_velocity": (K, K0, 5),
    "learning_curve": (K, Y, [2, 4], 0.1),
    "linearization_error": (Y, 2 * Y),
    "loo_residuals": (K, Y, 0.1),
    "max_stable_lr": (1.0,),
    "neural_feature_correlation": (K, BLOCKS),
    "noise_floor": (K,),
    "ntkgp_posterior": (K, Y, K0, K),
    "numerical_rank": (K,),
    "one_step_error": (ONE_HOT, THETA, ONE_HOT, 0.1),
    "parameter_distance": ({"w": K}, {"w": K0}),
    "participation_ratio": (K,),
    "path_length": ([K, K0],),
    "per_example_motion": (K, K0),
    "power_auc": (CURVE,),
    "power_k90": (CURVE,),
    "relative_change": (K, K0),
    "smallest_eigenvalue": (K,),
    "softmax_centred": (THETA,),
    "softmax_share": (THETA,),
    "spectral_update": (K, K0),
    "stability_ratio": (1.0, 0.1),
    "stable_rank": (K,),
    "target_alignment": (K, Y),
    "taylor_ratio": (Y, 2 * Y),
    "time_constants": (1.0, 0.1),
    "zero_modes": (K,),
}
VECTORS = {
    "center": (6, 6),
    "class_specialization": (2, 2),
    "cumulative_power": (6,),
    "cumulative_power_null": (6,),
    "eigenvalues": (6,),
    "gauss_newton_spectrum": (12,),
    "gradient_descent": (6, 1),
    "gradient_flow": (6, 1),
    "kernel_regression": (6, 1),
    "learning_curve": (2,),
    "loo_residuals": (6, 1),
    "per_example_motion": (6,),
    "softmax_centred": (6, 2, 6, 2),
}

UNDEFINED: list[tuple[str, tuple[Any, ...], str]] = [
    ("adam_stability_ratio", (torch.tensor(torch.nan), 0.1), "non-finite entries in the curvature"),
    ("after_kernel_gain", (ZERO, K0, Y, 4), "trace of the kernel is not positive"),
    ("alignment_null_mean", (K, CONSTANT), "targets are constant"),
    ("alignment_z", (torch.eye(6), Y, seeded()), "every permutation"),
    ("alignment_z", (K, CONSTANT, seeded()), "targets are constant"),
    ("asymmetry", (ZERO,), "kernel is zero"),
    ("center", (NAN_K,), "there are non-finite entries in the kernel"),
    ("centered_alignment", (K, CONSTANT), "targets are constant over the probes"),
    ("centered_alignment", (K, torch.eye(3).double()[[1] * 6]), "targets are constant"),  # a single class, one-hot
    ("centered_alignment", (K, 0.1 * CONSTANT + 7), "targets are constant"),  # up to rounding
    ("centered_alignment", (0.1 * ONES, Y), "zero once centred"),
    ("centered_alignment", (K[:2, :2], Y[1:3]), "at least 3 probes and has 2"),
    ("centered_alignment", (K, torch.nan * Y), "non-finite entries in the targets"),
    ("centered_distance", (K, ONES), "baseline kernel is zero once centred"),
    ("cka", (ONES, K), "the kernel is zero once centred"),
    ("class_block_fit", (ONES, Y), "kernel is constant"),
    ("class_block_fit", (K, CONSTANT), "no two probes of different classes"),
    ("class_block_fit", (K, CURVE[:, None]), "no two probes of one class"),
    ("class_specialization", (BLOCKS, torch.eye(2).double()[[0] * 6]), "classes [0, 1] are constant"),
    ("class_specialization", (torch.stack([K, ONES]), ONE_HOT), "block 1 is zero once centred"),
    ("complexity", (K[[0, 0, 1]][:, [0, 0, 1]], Y[:3]), "1 zero modes"),
    ("condition_number", (ZERO,), "kernel is zero"),
    ("coverage", (Y, ZERO.diagonal(), Y), "variance is not positive at 6 points"),
    ("cumulative_power", (K, CONSTANT), "targets are constant"),
    ("cumulative_power", (ZERO, Y), "kernel is zero"),
    ("cumulative_power_null", (ZERO,), "kernel is zero"),
    ("cumulative_power_null", (K[:1, :1],), "at least 2 probes"),
    ("decay_exponent", (ONES, (1, 3)), "noise floor"),
    ("decay_r2", (torch.eye(6), (1, 6)), "flat"),
    ("directness", ([K, K, 2 * K],), "has not turned"),
    ("discrete_time_constants", (torch.tensor(torch.nan), 0.1), "non-finite entries in the curvature"),
    ("effective_rank", (ZERO,), "kernel is zero"),
    ("effective_rank", (1e-3 * K, 1.0), "below its noise floor"),
    ("eigenlearning", (CURVE, CURVE[:, None], 6), "6 samples fix all 6 modes"),
    ("learning_curve", (ONES, Y, [2, 3]), "2 samples fix all 1 modes"),
    ("eigenvalues", (NAN_K,), "non-finite"),
    ("gauss_newton_spectrum", (THETA, -HESS), "indefinite"),
    ("gauss_newton_spectrum", (torch.nan * THETA, HESS), "non-finite"),
    ("gaussian_nll", (Y, ZERO.diagonal(), Y), "variance is not positive"),
    ("gcv", (ONES, Y, 0.0), "5 zero modes and the ridge does not lift them"),
    ("gp_posterior", (NAN_K, Y, K0, K, K0, K), "non-finite entries in the training kernel"),
    ("gradient_descent", (NAN_K, Y, Y, 3), "non-finite entries in the kernel"),
    ("gradient_flow", (K, torch.nan * Y, Y, 3.0), "non-finite entries in the outputs"),
    ("jackknife", (metrics.kernel_angle, ZERO, K0), "statistic is undefined"),
    ("kernel_angle", (K, ZERO), "the baseline kernel is zero"),
    ("kernel_angle", (torch.inf * ONES, K), "entries in the kernel"),
    ("kernel_distance", (ZERO, K), "the kernel is zero"),
    ("kernel_regression", (NAN_K, Y, K0), "non-finite"),
    ("kernel_scale", (K, -K0), "trace of the baseline kernel is not positive"),
    ("kernel_share", (K, ZERO), "trace of the kernel is not positive"),
    ("kernel_velocity", (ZERO, K, 5), "kernel is zero"),
    ("linearization_error", (0 * Y, Y), "have not moved"),
    ("loo_residuals", (ONES, Y, 0.0), "zero modes"),
    ("max_stable_lr", (0.0,), "every learning rate is stable"),
    ("neural_feature_correlation", (ZERO, BLOCKS), "weight or the gradients are zero"),
    ("noise_floor", (NAN_K,), "non-finite"),
    ("ntkgp_posterior", (NAN_K, Y, K0, K), "non-finite"),
    ("numerical_rank", (NAN_K,), "non-finite"),
    ("one_step_error", (ONE_HOT, THETA, 0 * ONE_HOT, 0.1), "predicts no motion"),
    ("parameter_distance", ({"w": K}, {"w": ZERO}), "baseline parameters are zero"),
    ("participation_ratio", (ZERO,), "kernel is zero"),
    ("path_length", ([K, ZERO],), "kernel is zero"),
    ("per_example_motion", (K, torch.diag(K0.diagonal() * (CURVE > 0.2))), "zero at 1 of 6 probes"),
    ("power_auc", (torch.nan * CURVE,), "non-finite entries in the curve"),
    ("power_k90", (torch.nan * CURVE,), "non-finite entries in the curve"),
    ("relative_change", (K, ZERO), "baseline kernel is zero"),
    ("smallest_eigenvalue", (ONES,), "at or below the noise floor"),
    ("softmax_centred", (THETA[:, :1, :, :1],), "softmax of one output is constant"),
    ("softmax_centred", (torch.nan * THETA,), "non-finite entries in the full kernel"),
    ("softmax_share", (THETA[:, :1, :, :1],), "softmax of one output is constant"),
    ("softmax_share", (0 * THETA,), "trace of the kernel is not positive"),
    ("spectral_update", (K, ZERO), "baseline weight is zero"),
    ("stability_ratio", (torch.tensor(torch.nan), 0.1), "non-finite entries in the curvature"),
    ("stable_rank", (ZERO,), "kernel is zero"),
    ("target_alignment", (ZERO, Y), "kernel is zero"),
    ("target_alignment", (K, 0 * Y), "targets are zero"),
    ("taylor_ratio", (0 * Y, Y), "outputs have not moved yet"),
    ("taylor_ratio", (torch.inf * Y, Y), "entries in the change of the outputs"),
    ("time_constants", (torch.tensor(torch.nan), 0.1), "non-finite entries in the curvature"),
    ("zero_modes", (NAN_K,), "non-finite"),
]

SKEW = torch.triu(ONES)
WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("centered_alignment", (K, Y[:, 0]), ValueError, r"y must be \[n, C\].*y\[:, None\]"),
    ("target_alignment", (K, Y[:, 0]), ValueError, r"y\[:, None\]"),
    ("class_specialization", (BLOCKS, Y[:, 0]), ValueError, r"y\[:, None\]"),
    ("gradient_flow", (K, Y[:, 0], Y, 1.0), ValueError, r"f0\[:, None\]"),
    ("kernel_regression", (K, Y[:, 0], K0), ValueError, r"y\[:, None\]"),
    ("centered_alignment", (K, Y[:4]), ValueError, r"\[6, C\]; got shape \(4, 1\)"),
    ("centered_alignment", (K, Y.long()), TypeError, r"float tensor; got torch.int64; pass y.double\(\)"),
    ("kernel_angle", (K.numpy(), K0), TypeError, r"torch.Tensor; got ndarray"),
    ("kernel_angle", (K, K0[:4, :4]), ValueError, r"\(6, 6\) and \(4, 4\)"),
    ("kernel_angle", (K[:0], K0[:0]), ValueError, "at least one"),
    ("kernel_scale", (K[:4], K0[:4]), ValueError, r"got shape \(4, 6\)"),
    ("cka", (THETA, THETA), ValueError, "trace or sum kernel"),
    ("cka", (SKEW, K), ValueError, "symmetric"),
    ("eigenvalues", (SKEW,), ValueError, "symmetric.*need no symmetry"),
    ("softmax_centred", (K,), ValueError, r"\[n, C, m, C\]; got shape \(6, 6\).*reduction='full'"),
    ("asymmetry", (K[:4],), ValueError, r"got shape \(4, 6\)"),
    ("eigenvalues", (BLOCKS,), ValueError, r"one block, k\[c\]"),
    ("eigenvalues", (-K,), ValueError, "positive semi-definite.*floor="),
    ("decay_exponent", (K, (0, 4)), ValueError, "ranks count from 1"),
    ("decay_exponent", (K, (1, 7)), ValueError, "last ≤ 6"),
    ("decay_exponent", (K, (2, 3)), ValueError, "at least 3 ranks"),
    ("kernel_velocity", (K, K0, 0), ValueError, "steps must be positive"),
    ("path_length", ([K],), ValueError, "at least 2"),
    ("alignment_z", (K, Y, seeded(), 1), ValueError, "permutations must be at least 2"),
    ("class_specialization", (K, Y), ValueError, "reduction='blocks'"),
    ("class_specialization", (BLOCKS, Y), ValueError, "2 columns"),
    ("power_k90", (CURVE, 90), ValueError, "share such as 0.9"),
    ("power_auc", (K,), ValueError, "what cumulative_power returns"),
    ("one_step_error", (ONE_HOT, K, ONE_HOT, 0.1), ValueError, "reduction='full'"),
    ("parameter_distance", ({"w": K}, {"v": K}), ValueError, r"\['v', 'w'\] in one alone"),
    ("spectral_update", (Y[:, 0], Y[:, 0]), ValueError, "not biases"),
    ("neural_feature_correlation", (K, K), ValueError, r"\[N, C, in\]"),
    ("max_stable_lr", (-1.0,), ValueError, "mu must be ≥ 0"),
    ("max_stable_lr", (1.0, 1.0), ValueError, r"momentum must be in \[0, 1\)"),
    ("stability_ratio", (1.0, 0.1, 0.9, True, 0.5), ValueError, "dampening must be 0 with nesterov"),
    ("gauss_newton_spectrum", (K, HESS), ValueError, "reduction='full'"),
    ("gradient_flow", (K, Y, ONE_HOT, 1.0), ValueError, "f0 and y"),
    ("gradient_flow", (K, Y, Y, -1.0), ValueError, "t must be finite"),
    ("gradient_descent", (K, Y, Y, 1.5), ValueError, "gradient_flow"),
    ("kernel_regression", (K, Y, K0[:, :3]), ValueError, r"\[m, 6\].*transpose"),
    ("gcv", (K, Y, -0.1), ValueError, "ridge must be ≥ 0"),
    ("eigenlearning", (K, Y, 3), ValueError, r"\[M\]"),
    ("eigenlearning", (CURVE, CURVE[:, None], 0), ValueError, "n must be > 0"),
    ("learning_curve", (K, Y, [6]), ValueError, r"samples must lie in \(0, 6\)"),
    ("after_kernel_gain", (K, K0, Y, 6), ValueError, "to both sides"),
    ("gp_posterior", (K, Y, K0, K, K0[:2], K), ValueError, "6 rows"),
    ("gp_posterior", (K, Y, K0, K[:2, :2], K0, K), ValueError, r"s_train must be \[6, 6\]"),
    ("coverage", (Y, K.diagonal(), Y, 95), ValueError, "share such as 0.95"),
    ("gaussian_nll", (Y, CURVE[:3], Y), ValueError, "match them"),
    ("jackknife", (metrics.centered_alignment, K[:1, :1]), ValueError, "at least 2 probes"),
]


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [getattr(value, field.name) for field in dataclasses.fields(value)]  # type: ignore[arg-type]


def test_every_metric_has_a_defined_and_an_undefined_case():
    assert set(DEFINED) == set(NAMES)
    assert {name for name, _, _ in UNDEFINED} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_defined_metric_is_float64_finite_and_leaves_its_arguments(name: str):
    before = [a.clone() for a in DEFINED[name] if isinstance(a, Tensor)]
    value = getattr(metrics, name)(*DEFINED[name])
    for tensor in tensors(value):
        assert tensor.dtype == torch.float64
        assert bool(tensor.isfinite().all()), tensor
    if isinstance(value, Tensor):
        assert tuple(value.shape) == VECTORS.get(name, ())
    assert all(map(torch.equal, before, (a for a in DEFINED[name] if isinstance(a, Tensor))))
    assert metrics.why_undefined(name, *DEFINED[name]) is None


@pytest.mark.parametrize(("name", "args", "reason"), UNDEFINED, ids=lambda x: x if isinstance(x, str) else "")
def test_an_undefined_metric_is_nan_and_says_why(name: str, args: tuple[Any, ...], reason: str):
    value = getattr(metrics, name)(*args)
    assert any(bool(tensor.isnan().any()) for tensor in tensors(value)), value
    assert all(tensor.dtype == torch.float64 for tensor in tensors(value))
    for tensor, defined in zip(tensors(value), tensors(getattr(metrics, name)(*DEFINED[name])), strict=True):
        assert tensor.ndim == defined.ndim, "an undefined result has the shape of a defined one"
    sentence = metrics.why_undefined(name, *args)
    assert sentence is not None
    assert reason in sentence


@pytest.mark.parametrize(("name", "args", "error", "match"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_arguments_raise_and_never_turn_into_nan(name: str, args: tuple[Any, ...], error: type, match: str):
    for call in (getattr(metrics, name), lambda *a: metrics.why_undefined(name, *a)):
        with pytest.raises(error, match=match) as caught:
            call(*args)
        assert str(caught.value).count(";") >= 2, f"not of the form what; got; do this: {caught.value}"


def test_an_unknown_metric_names_its_neighbours():
    with pytest.raises(ValueError, match="kernel_angle"):
        metrics.why_undefined("kernel_angel", K, K0)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_is_what_explain_prints(name: str):
    doc = inspect.getdoc(getattr(metrics, name)) or ""
    assert re.fullmatch(r"[A-Z][^\n]*\.", doc.split("\n\n")[0]), "one summary line"
    heads = re.findall(r"^(Formula|Shape|Range|Source|Pitfalls): \S", doc, re.M)
    assert heads == ["Formula", "Shape", "Range", "Source", "Pitfalls"]
    assert ">>> " in doc


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lower_precision_comes_in_and_float64_comes_out(dtype: torch.dtype):
    value = metrics.kernel_angle(K.to(dtype), K0.to(dtype))
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(float(metrics.kernel_angle(K, K0)), rel=10 * torch.finfo(dtype).eps)


ON_TENSORS = [name for name in NAMES if any(isinstance(a, Tensor) for a in DEFINED[name])]


@pytest.mark.parametrize("name", ON_TENSORS)
def test_no_tensor_is_made_off_its_arguments_device(name: str):
    """With "meta" as the default device a tensor made without device= cannot be combined with the arguments."""
    for args in [DEFINED[name]] + [args for other, args, _ in UNDEFINED if other == name]:
        with torch.device("meta"):
            value = getattr(metrics, name)(*args)
        assert all(tensor.device == K.device for tensor in tensors(value)), args


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    for name in sorted(set(ON_TENSORS) - {"alignment_z"}):  # its generator draws another sequence there
        args = [a.cuda() if isinstance(a, Tensor) else a for a in DEFINED[name]]
        for cpu, cuda in zip(*(tensors(getattr(metrics, name)(*a)) for a in (DEFINED[name], args)), strict=True):
            assert cuda.is_cuda, name
            assert torch.allclose(cpu, cuda.cpu(), rtol=1e-9, atol=1e-9), name

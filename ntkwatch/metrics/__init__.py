"""What to read off a kernel: pure functions of tensors.

Float tensors in, 0-d float64 tensors (or vectors, or a frozen dataclass of them) out, on the tensors' own device.
NaN means undefined, and `why_undefined(name, *args)` says why in a sentence. Kernels are [n, n]; where it makes sense
also blocks [C, n, n] and full [n, C, n, C]. Targets and outputs are [n, C] as given.
"""

from __future__ import annotations

from ntkwatch.metrics.alignment import (
    ClassBlocks,
    alignment_null_mean,
    alignment_z,
    centered_alignment,
    class_block_fit,
    class_specialization,
    target_alignment,
)
from ntkwatch.metrics.distance import (
    asymmetry,
    center,
    centered_distance,
    cka,
    directness,
    kernel_angle,
    kernel_distance,
    kernel_scale,
    kernel_share,
    kernel_velocity,
    path_length,
    per_example_motion,
    relative_change,
)
from ntkwatch.metrics.dynamics import (
    adam_stability_ratio,
    discrete_time_constants,
    gauss_newton_spectrum,
    gradient_descent,
    gradient_flow,
    max_stable_lr,
    stability_ratio,
    time_constants,
)
from ntkwatch.metrics.error_bars import Jackknife, jackknife
from ntkwatch.metrics.laziness import (
    linearization_error,
    neural_feature_correlation,
    one_step_error,
    parameter_distance,
    spectral_update,
    taylor_ratio,
)
from ntkwatch.metrics.learning import Eigenlearning, eigenlearning, learning_curve
from ntkwatch.metrics.posterior import Posterior, coverage, gaussian_nll, gp_posterior, ntkgp_posterior
from ntkwatch.metrics.power import cumulative_power, cumulative_power_null, power_auc, power_k90
from ntkwatch.metrics.regression import (
    after_kernel_gain,
    complexity,
    gcv,
    kernel_regression,
    loo_residuals,
)
from ntkwatch.metrics.softmax import softmax_centred, softmax_share
from ntkwatch.metrics.spectrum import (
    condition_number,
    decay_exponent,
    decay_r2,
    effective_rank,
    eigenvalues,
    noise_floor,
    numerical_rank,
    participation_ratio,
    smallest_eigenvalue,
    stable_rank,
    zero_modes,
)
from ntkwatch.metrics.undefined import why_undefined

__all__ = [
    "ClassBlocks",
    "Eigenlearning",
    "Jackknife",
    "Posterior",
    "adam_stability_ratio",
    "after_kernel_gain",
    "alignment_null_mean",
    "alignment_z",
    "asymmetry",
    "center",
    "centered_alignment",
    "centered_distance",
    "cka",
    "class_block_fit",
    "class_specialization",
    "complexity",
    "condition_number",
    "coverage",
    "cumulative_power",
    "cumulative_power_null",
    "decay_exponent",
    "decay_r2",
    "directness",
    "discrete_time_constants",
    "effective_rank",
    "eigenlearning",
    "eigenvalues",
    "gauss_newton_spectrum",
    "gaussian_nll",
    "gcv",
    "gp_posterior",
    "gradient_descent",
    "gradient_flow",
    "jackknife",
    "kernel_angle",
    "kernel_distance",
    "kernel_regression",
    "kernel_scale",
    "kernel_share",
    "kernel_velocity",
    "learning_curve",
    "linearization_error",
    "loo_residuals",
    "max_stable_lr",
    "neural_feature_correlation",
    "noise_floor",
    "ntkgp_posterior",
    "numerical_rank",
    "one_step_error",
    "parameter_distance",
    "participation_ratio",
    "path_length",
    "per_example_motion",
    "power_auc",
    "power_k90",
    "relative_change",
    "smallest_eigenvalue",
    "softmax_centred",
    "softmax_share",
    "spectral_update",
    "stability_ratio",
    "stable_rank",
    "target_alignment",
    "taylor_ratio",
    "time_constants",
    "why_undefined",
    "zero_modes",
]

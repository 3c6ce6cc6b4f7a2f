"""What compares outputs carries their rounding error: where that is as large as what it measures, it says nothing."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from ntkwatch.diagnostics.view import Motion, View, known
from ntkwatch.metrics.undefined import Undefined

N = TypeVar("N", float, Tensor)
ABOVE = 3.0  # times its rounding error, which is known to within a factor of two: a value that tells something
NEGLIGIBLE = 1e-3  # a ratio's rounding error that no reading of it sees: a linear network's ratio is near zero


def above_rounding(value: N, error: float, rounded_to: str) -> N:
    """The value of a ratio; raises `Undefined` where rounding error makes it, unless that is negligible."""
    if error > NEGLIGIBLE and float(value) < ABOVE * error:
        raise Undefined(
            f"the motion is below rounding: the ratio is {float(value):.1e}, and rounding to {rounded_to} alone makes "
            f"about {error:.1e}"
        )
    return value


def moved(view: View) -> Motion:
    """The motion since the baseline; raises `Undefined` where there is none, or none above the outputs' rounding."""
    motion = known(view.motion)
    if not any(distance for distance, _ in known(view.parameter_distances).values()):
        raise Undefined("no motion yet: the parameters are those of the baseline")
    size, error = float(motion.delta_f.norm()), float(motion.f_rounding.norm())
    if size < ABOVE * error or size == 0:
        raise Undefined(
            f"the motion is below rounding: the outputs moved by {size:.1e}, and rounding to {motion.rounded_to} alone "
            f"moves them by about {error:.1e}"
        )
    return motion


def departure_rounding(motion: Motion) -> float:
    """The rounding error of ‖Δf − J_0Δθ‖."""
    return float((motion.f_rounding + motion.j_rounding).norm())


def forecast_rounding(motion: Motion, forecast: Tensor) -> float:
    """The rounding error of ‖Δf − Δf̂‖, Δf̂ a motion along other weights at the same tangent."""
    linear = float(motion.j0_delta_theta.norm())
    relative = float(motion.j_rounding.norm()) / linear if linear else 0.0
    return float(motion.f_rounding.norm()) + relative * float(forecast.norm())

"""The network trained as if it were lazy, beside the run.

In: each training batch and the run's own optimizer. Out: the linear model's outputs on the probes (`LinearForecast`).
Read `forecast`, then `optimizer_copy` (the optimizer's own rule on other parameters).
"""

from __future__ import annotations

from ntkwatch.linearized.forecast import LinearForecast

__all__ = ["LinearForecast"]

"""Watch the Neural Tangent Kernel of a real training run, live.

>>> from ntkwatch import NTKWatch
>>> NTKWatch(probes=32, every=100).record is None
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "NTKWatch": "frontends.lightning",
    "watch": "frontends.loop",
    "Monitor": "measurement.monitor",
    "Measurement": "record",
    "Run": "record",
    "load_run": "record",
    "RecordError": "record",
    "ProbeSet": "probes",
    "UnsupportedModel": "model",
    "empirical_ntk": "engines",
    "layer_ntks": "engines",
    "plan": "measurement.cost",
    "compare_runs": "compare",
    "twins": "output_scaling",
    "output_scale": "output_scaling",
    "Comparison": "compare",
}
_ROOMS = ("metrics", "infinite")

__all__ = [
    "Comparison",
    "Measurement",
    "Monitor",
    "NTKWatch",
    "ProbeSet",
    "RecordError",
    "Run",
    "UnsupportedModel",
    "__version__",
    "compare_runs",
    "empirical_ntk",
    "infinite",
    "layer_ntks",
    "load_run",
    "metrics",
    "output_scale",
    "plan",
    "twins",
    "watch",
]

if TYPE_CHECKING:
    from ntkwatch import infinite, metrics
    from ntkwatch.compare import Comparison, compare_runs
    from ntkwatch.engines import empirical_ntk, layer_ntks
    from ntkwatch.frontends.lightning import NTKWatch
    from ntkwatch.frontends.loop import watch
    from ntkwatch.measurement.cost import plan
    from ntkwatch.measurement.monitor import Monitor
    from ntkwatch.model import UnsupportedModel
    from ntkwatch.output_scaling import output_scale, twins
    from ntkwatch.probes import ProbeSet
    from ntkwatch.record import Measurement, RecordError, Run, load_run


def __getattr__(name: str) -> Any:
    """Names are loaded when they are asked for: `import ntkwatch` costs nothing."""
    if name in _ROOMS:
        return importlib.import_module(f"ntkwatch.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"ntkwatch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ntkwatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

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
    "NTKWatch": "callback",
    "Monitor": "monitor",
    "Measurement": "record",
    "Run": "record",
    "load_run": "record",
    "RecordError": "record",
    "ProbeSet": "probes",
    "UnsupportedModel": "model",
    "empirical_ntk": "engines",
    "layer_ntks": "engines",
    "plan": "costs",
    "compare_runs": "compare",
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
    "plan",
]

if TYPE_CHECKING:
    from ntkwatch import infinite, metrics
    from ntkwatch.callback import NTKWatch
    from ntkwatch.compare import Comparison, compare_runs
    from ntkwatch.costs import plan
    from ntkwatch.engines import empirical_ntk, layer_ntks
    from ntkwatch.model import UnsupportedModel
    from ntkwatch.monitor import Monitor
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

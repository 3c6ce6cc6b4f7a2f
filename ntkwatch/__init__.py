"""Watch the Neural Tangent Kernel of a real training run, live."""

from __future__ import annotations

__version__ = "0.1.0"

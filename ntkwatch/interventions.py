"""Deprecated alias of `ntkwatch.twins` and `ntkwatch.output_scale`; kept for scripts that import it."""

from __future__ import annotations

from ntkwatch.output_scaling import output_scale, twins

__all__ = ["output_scale", "twins"]

"""Rules that turn graph nodes into per-example factors; importing the modules below registers their rules."""

from __future__ import annotations

from ntkwatch.engines.rules import positions, products
from ntkwatch.engines.rules.products import unfolding
from ntkwatch.engines.rules.use import EACH, Use, factor, operand_shape

__all__ = ["EACH", "Use", "factor", "operand_shape", "positions", "products", "unfolding"]

"""All planted bugs."""

from __future__ import annotations

from tests.mutants.planting import Bug
from tests.mutants.table_metrics import METRICS

BUGS: tuple[Bug, ...] = (*METRICS,)

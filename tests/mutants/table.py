"""All planted bugs."""

from __future__ import annotations

from tests.mutants.planting import Bug
from tests.mutants.table_callback import CALLBACK, SCHEDULE
from tests.mutants.table_compare import COMPARE, INFINITE, PROBES
from tests.mutants.table_engines import ENGINES
from tests.mutants.table_guard import GUARD
from tests.mutants.table_metrics import METRICS
from tests.mutants.table_ranks import FORECAST, RANKS
from tests.mutants.table_record import LOGGERS, RECORD

BUGS: tuple[Bug, ...] = (
    *METRICS,
    *ENGINES,
    *GUARD,
    *SCHEDULE,
    *CALLBACK,
    *RANKS,
    *FORECAST,
    *RECORD,
    *LOGGERS,
    *PROBES,
    *COMPARE,
    *INFINITE,
)

"""`make claims`: what the literature says and what this library measures, side by side; exit 1 outside the bands.

`python -m tests.claims [--quick] [NAME …]` runs all or the named ones; --quick is the sample that `make test` runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch

from tests.claims.digits import labels, width
from tests.claims.ladder import after, ladder
from tests.claims.small import analytic, catapult, pseudo, silent
from tests.claims.table import Row, show

CLAIMS: dict[str, Callable[[bool], list[Row]]] = {
    "C1-C3": width,
    "C2": analytic,
    "ladder-C5": ladder,
    "C6": after,
    "C7-C8": labels,
    "C10": silent,
    "C11": catapult,
    "C13": pseudo,
}


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 where every row is inside its band, 1 where one is not, 2 for an unknown name."""
    quick, names = "--quick" in arguments, [a for a in arguments if a != "--quick"]
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        print(f"unknown claims {unknown}: use some of {', '.join(CLAIMS)}")
        return 2
    torch.manual_seed(0)
    found: list[Row] = []
    for name in names or CLAIMS:
        began = time.perf_counter()
        rows = CLAIMS[name](quick)
        print(show(rows) if not found else "\n".join(show(rows).splitlines()[1:]))
        print(f"       {name}: {time.perf_counter() - began:.0f} s", flush=True)
        found += rows
    outside = [row for row in found if not row.holds]
    print(f"{len(found) - len(outside)} of {len(found)} inside their bands")
    return int(bool(outside))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

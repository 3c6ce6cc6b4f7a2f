"""Two runs on the same probes → how alike their kernels are, step by step and layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntkwatch.compare.runs import CompareError, MismatchError, differences, json_rows, last_common_step, names_of
from ntkwatch.record import Run, load_run

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SIMILARITIES = ("angle", "cka", "scale")


@dataclass(frozen=True)
class Difference:
    """How kernel B stands to kernel A: angle in rad, CKA in [0, 1], scale = log(tr K_B / tr K_A).

    `table`: a row per common step; `layers`: a row per parameter that both have, at `step`, with its share of the trace
    in each; `only`: parameters that one of them lacks.
    """

    names: tuple[str, str]
    step: int
    table: pd.DataFrame
    layers: pd.DataFrame
    only: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON types; an undefined number is None."""
        return {
            "runs": list(self.names),
            "step": self.step,
            "steps": json_rows(self.table),
            "layers": json_rows(self.layers),
            "only_in_one": list(self.only),
        }


def diff_runs(a: str | os.PathLike[str], b: str | os.PathLike[str], step: int | None = None) -> Difference:
    """Compare the kernels of two records at every step both measured, and their layers at `step` (default the last).

    CKA is that of the [n, n] kernel (the trace reduction where a richer one was measured). Raises MismatchError for
    unlike probes, reduction or mode, CompareError without a common step, RecordError without saved kernels.
    """
    import pandas as pd

    runs = load_run(str(a)), load_run(str(b))
    unlike = differences(runs, ("probe hash", "reduction", "mode"))
    if unlike:
        raise MismatchError(f"kernels on unlike grounds cannot be compared: {'; '.join(unlike)}")
    last = last_common_step(runs)
    common = sorted(set(runs[0].steps) & set(runs[1].steps))
    chosen = last if step is None else step
    if chosen not in common:
        raise CompareError(
            f"step {chosen} is not one that both runs measured: choose from {', '.join(map(str, common))}"
        )
    table = pd.DataFrame([{"step": s} | _similarity(*(_kernels(run, s) for run in runs)) for s in common])
    layers, only = _layers(runs, chosen)
    return Difference((names_of(runs)[0], names_of(runs)[1]), chosen, table, layers, only)


def _kernels(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """The kernel as it was measured, and an [n, n] one."""
    kernel = run.kernel(step)
    return kernel, kernel if kernel.ndim == 2 else sum(run.layers(step).values(), kernel.new_zeros(()))


def _similarity(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> dict[str, float]:
    from ntkwatch import metrics

    return {
        "angle": _number(lambda: metrics.kernel_angle(b[0], a[0])),
        "cka": _number(lambda: metrics.cka(b[1], a[1])),
        "scale": _number(lambda: metrics.kernel_scale(b[0], a[0])),
    }


def _number(compute: Callable[[], Tensor]) -> float:
    """NaN where the metric refuses its input, as for kernels of unlike shape."""
    try:
        return float(compute())
    except ValueError:
        return math.nan


def _layers(runs: tuple[Run, Run], step: int) -> tuple[pd.DataFrame, tuple[str, ...]]:
    import pandas as pd

    a, b = (run.layers(step) for run in runs)
    totals = [float(sum(k.trace() for k in layers.values())) for layers in (a, b)]
    rows = [
        {
            "layer": name,
            "share_a": float(a[name].trace()) / totals[0],
            "share_b": float(b[name].trace()) / totals[1],
        }
        | _similarity((a[name], a[name]), (b[name], b[name]))
        for name in _in_order(runs[0], a)
        if name in b
    ]
    columns = ["layer", "share_a", "share_b", *SIMILARITIES]
    return pd.DataFrame(rows, columns=columns), tuple(sorted(set(a) ^ set(b)))


def _in_order(run: Run, names: Iterable[str]) -> list[str]:
    """As the model has them, not as the file does."""
    place = {name: i for i, name in enumerate(run.manifest.get("parameters") or [])}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))

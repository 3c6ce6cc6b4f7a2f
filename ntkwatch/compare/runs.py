"""What is asked of several runs before they are put side by side: errors, names, places on an axis, common steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkwatch.record import Run
from ntkwatch.summary import printable

if TYPE_CHECKING:
    import pandas as pd

SEED_NAMES = ("seed", "random_seed", "rng_seed", "seed_everything")


class CompareError(ValueError):
    """Runs that cannot be put in one table: which, why, what to do."""


class MismatchError(CompareError):
    """Runs whose kernels are not the same quantity (probes, reduction, mode or diagnostics differ)."""


def x_of(run: Run, x: str) -> float:
    """What places a run on the x axis: its width, or any hyperparameter; CompareError names the run and the remedy."""
    number = run.width if x == "width" else run.hparam(x)
    if number is not None and number > 0:
        return number
    hparams = run.manifest.get("hparams") or {}
    if number is None and x not in hparams:
        raise CompareError(
            f"{run.folder} has no hyperparameter {x!r} (it has {', '.join(sorted(hparams)) or 'none'}): record it with "
            f"save_hyperparameters() or NTKWatch(hparams={{{x!r}: …}}), or name another with --x"
        )
    got = hparams.get(x) if number is None else number
    raise CompareError(f"{run.folder} has {x} = {got!r}: a log–log axis needs a positive number; name another with --x")


def differences(runs: Sequence[Run], of_what: Iterable[str] | None = None) -> list[str]:
    """What makes the kernels of these runs unlike quantities: one clause for each of probes, targets, reduction, …"""
    clauses = []
    for what, of in ((what, IDENTITY[what]) for what in of_what or IDENTITY):
        groups: dict[str, list[str]] = {}
        for run, name in zip(runs, names_of(runs), strict=True):
            groups.setdefault(of(run.manifest), []).append(name)
        if len(groups) > 1:
            sides = " against ".join(f"{value} in {abbreviated(names)}" for value, names in groups.items())
            clauses.append(f"{what}: {sides}")
    return clauses


def _probes(manifest: Mapping[str, Any], key: str) -> str:
    value = (manifest.get("probes") or {}).get(key)
    return "none" if value is None else str(value)[:12]


IDENTITY: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "probe hash": lambda m: _probes(m, "hash"),
    "targets hash": lambda m: _probes(m, "targets_hash"),
    "reduction": lambda m: str(m.get("reduction")),
    "mode": lambda m: str(m.get("mode")),
    "diagnostics": lambda m: str(m.get("diagnostics")),
    "record schema": lambda m: str(m.get("schema")),
}


def last_common_step(runs: Sequence[Run]) -> int:
    """The largest step that every run measured; CompareError where there is none."""
    shared = set(runs[0].steps).intersection(*(run.steps for run in runs[1:]))
    if shared:
        return max(shared)
    ends = abbreviated([f"{name} {_span(run)}" for run, name in zip(runs, names_of(runs), strict=True)])
    raise CompareError(f"the runs share no measured step ({ends}): watch them with the same every=")


def _span(run: Run) -> str:
    return f"{run.steps[0]}–{run.steps[-1]}" if run.steps else "has no probe yet"


def names_of(runs: Sequence[Run]) -> list[str]:
    """Short distinct names: the folders, without the part that all share and without `ntkwatch` and what is below."""
    parts = [list(Path(run.folder).resolve().parts) for run in runs]
    parts = [p[:-1] if p[-1] == "ntkwatch" and len(p) > 2 else p for p in parts]
    if len(parts) < 2:
        return [printable(p[-1]) for p in parts]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    names = [printable("/".join(p[shared:])) for p in parts]
    if len(set(names)) < len(names):
        return [str(run.folder) for run in runs]
    shorter = [name.partition("/ntkwatch/")[0] for name in names]  # a run that no logger gave a folder
    return shorter if len(set(shorter)) == len(names) else names


def seed_of(run: Run) -> int | None:
    """The run's training seed, where its hyperparameters hold one that a table's 64 bits hold."""
    seeds = (run.hparam(name) for name in SEED_NAMES)
    return next((int(seed) for seed in seeds if seed is not None and abs(seed) < 2**63), None)


def json_rows(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON types; an undefined number is None."""
    return [{str(k): json_value(v) for k, v in row.items()} for row in rows.to_dict("records")]


def json_value(value: Any) -> Any:
    """One value as a JSON type; None where undefined."""
    import pandas as pd

    return None if pd.isna(value) or value in (math.inf, -math.inf) else getattr(value, "item", lambda: value)()


def abbreviated(names: Sequence[str]) -> str:
    """Names for a sentence, cut short when there are many."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} others"

"""What is undefined in a run, by reason: names that are never defined, and names that are at some steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MAX_NAMES = 8  # listed for one reason at single steps; the table shows where each of them is missing


def never_defined(metrics: pd.DataFrame) -> list[str]:
    """Names without a value at any step."""
    return [str(name) for name in metrics.columns if metrics[name].isna().all()]


def undefined(metrics: pd.DataFrame, reasons: Mapping[int, Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """(of names that are never defined, of the others): "names: reason" and "names at steps: reason".

    Reasons that differ in their numbers alone count as one; the last step's wording is shown.

    >>> import pandas as pd
    >>> metrics = pd.DataFrame({"a": [None, 1.0], "b": [None, None], "c": [None, None]}, index=[0, 4])
    >>> undefined(metrics, {0: {"a": "no motion", "b": "3 zero modes"}, 4: {"b": "4 zero modes", "c": "4 zero modes"}})
    (['b, c: 4 zero modes'], ['a at step 0: no motion'])
    """
    never = never_defined(metrics)
    found: dict[tuple[str, str], list[int]] = {}  # steps by name and form of the reason
    words: dict[str, str] = {}
    for step, by_name in sorted(reasons.items()):
        for name, why in by_name.items():
            form = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?", "#", why)
            words[form] = why
            found.setdefault((name, form), []).append(step)
    always: dict[str, list[str]] = {}
    for name in never:
        forms = [form for other, form in found if other == name]
        if forms:
            always.setdefault(forms[-1], []).append(name)  # the reason at the end; at the start nothing has moved yet
    partly: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (name, form), steps in found.items():
        if name not in never:
            partly.setdefault((form, tuple(steps)), []).append(name)
    whole = [f"{', '.join(names)}: {words[form]}" for form, names in always.items()]
    return whole, [f"{_some(names)} at {_steps(steps)}: {words[form]}" for (form, steps), names in partly.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MAX_NAMES else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]:,}"
    return f"{len(steps)} steps, {steps[0]:,} to {steps[-1]:,}"

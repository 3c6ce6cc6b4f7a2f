"""What `ntkwatch explain` says: the docstring of the metric's own function, so that it cannot drift from the code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

# Logged names that are another function's values.
SAME_AS = {
    "centered_alignment_z": "alignment_z",
    "log10_lambda_max": "eigenvalues",
    **{f"log10_lambda_{i}": "eigenvalues" for i in range(1, 6)},
    "share": "kernel_share",
    "angle": "kernel_angle",
    "alignment": "centered_alignment",
}
OVERHEAD = """Share of the run's wall time that the watch takes.

Formula: seconds of probing, planning, the engine's self-check and the linear forecast, over all seconds since the start
Range: [0, 1]
Source: the run's clock
Pitfalls: some five seconds in all are free, so that a short run's share is above budget=; the linear forecast, which is
    only there by name, is outside budget="""
OF_A_MODULE = "of the kernel of one module's own parameters, logged as ntk_layers/<module>/"
OWN_WORDS = {
    "centered_alignment_z": "centered_alignment against 200 seeded shuffles of the labels, the same at every step.",
    "overhead": OVERHEAD,
    "share": f"Part {OF_A_MODULE}share.",
    "angle": f"Rotation since the baseline {OF_A_MODULE}angle.",
    "alignment": f"Alignment with the targets {OF_A_MODULE}alignment.",
    "log10_lambda_max": "log10 of the kernel's largest eigenvalue.",
    **{f"log10_lambda_{i}": f"log10 of the kernel's eigenvalue number {i}, from the largest." for i in range(1, 6)},
}


def entries() -> list[str]:
    """Every name that `entry` knows, sorted."""
    return sorted({*_functions(), *_diagnostics(), *SAME_AS, *OWN_WORDS})


def listing() -> list[tuple[str, str]]:
    """Every name with the first sentence of its entry."""
    return [(name, (entry(name) or "").splitlines()[0]) for name in entries()]


def entry(name: str) -> str | None:
    """What a metric is: formula, shape, range, source, pitfalls; None for an unknown name.

    A name may be given as it is logged, with ntk/ or ntk_layers/<module>/ before it.
    """
    functions, diagnostics, name = _functions(), _diagnostics(), name.rpartition("/")[2]
    function = functions.get(name) or functions.get(SAME_AS.get(name, "")) or diagnostics.get(name)
    own, documented = OWN_WORDS.get(name), inspect.getdoc(function) if function else None
    if own is None and documented is None:
        return None
    source = f"From {SAME_AS[name]}:" if name in SAME_AS else None
    logged = inspect.getdoc(diagnostics[name]) if name in functions and name in diagnostics else None
    recorded = f"As recorded: {logged}" if logged and logged != documented else None
    parts = (own, source, _without_examples(documented or ""), recorded)
    return "\n\n".join(part for part in parts if part)


def _functions() -> dict[str, Callable[..., Any]]:
    from ntkwatch import metrics

    public = {name: getattr(metrics, name) for name in metrics.__all__}
    return {name: value for name, value in public.items() if inspect.isfunction(value) and name != "why_undefined"}


def _diagnostics() -> dict[str, Callable[..., Any]]:
    """What the monitor computes itself, such as the share of BatchNorm's statistics in the motion."""
    from ntkwatch.diagnostics import DIAGNOSTICS

    return {name: diagnostic.compute for name, diagnostic in DIAGNOSTICS.items()}


def _without_examples(documented: str) -> str:
    return documented.partition("\n>>>")[0].rstrip()

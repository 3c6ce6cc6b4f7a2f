"""What one probe has seen → the numbers it reports: a table of named functions that can be asked.

A diagnostic is a function of a `View`. It returns a number, or raises `Undefined` with the reason, which a NaN from
`ntkwatch.metrics` is turned into.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ntkwatch.diagnostics.alignment import ALIGNMENT, MORE_ALIGNMENT
from ntkwatch.diagnostics.diagnostic import Diagnostic, Price
from ntkwatch.diagnostics.errors import ERRORS
from ntkwatch.diagnostics.flow import FIXED_KERNEL
from ntkwatch.diagnostics.generalisation import GENERALISATION
from ntkwatch.diagnostics.layers import defined, layer_metrics
from ntkwatch.diagnostics.laziness import LAZINESS, MORE_LAZINESS
from ntkwatch.diagnostics.motion import MOTION
from ntkwatch.diagnostics.optimisation import OPTIMISATION
from ntkwatch.diagnostics.signs import SIGN_DESCENT
from ntkwatch.diagnostics.softmax import SOFTMAX
from ntkwatch.diagnostics.spectrum import MORE_SPECTRUM, SPECTRUM
from ntkwatch.diagnostics.uncertainty import UNCERTAINTY
from ntkwatch.diagnostics.view import Motion, View

__all__ = [
    "DIAGNOSTICS",
    "SECTIONS",
    "Diagnostic",
    "Motion",
    "Price",
    "View",
    "costs",
    "evaluate",
    "layer_metrics",
    "names_forecast",
    "needs_limit",
    "prices",
    "reduction",
    "select",
]

DIAGNOSTICS: dict[str, Diagnostic] = {
    **{name: diagnostic for name, diagnostic in MOTION.items() if diagnostic.default},
    **ALIGNMENT,
    **SPECTRUM,
    **LAZINESS,
    **{name: diagnostic for name, diagnostic in MOTION.items() if not diagnostic.default},
    **MORE_SPECTRUM,
    **MORE_ALIGNMENT,
    **MORE_LAZINESS,
    **OPTIMISATION,
    **SOFTMAX,
    **SIGN_DESCENT,
    **FIXED_KERNEL,
    **GENERALISATION,
    **UNCERTAINTY,
    **ERRORS,
}
SECTIONS: dict[str, tuple[str, ...]] = {
    "kernel motion": tuple(MOTION),
    "spectrum": (*SPECTRUM, *MORE_SPECTRUM),
    "alignment": (*ALIGNMENT, *MORE_ALIGNMENT),
    "lazy or rich": (*LAZINESS, *MORE_LAZINESS),
    "optimisation": (*OPTIMISATION, *SOFTMAX, *SIGN_DESCENT),
    "loss if lazy": tuple(FIXED_KERNEL),
    "generalisation": (*GENERALISATION, *UNCERTAINTY),
    "error bars": tuple(ERRORS),
}
DERIVED_FROM = ("any", "blocks", "full")  # each holds what the ones before it do


def select(diagnostics: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the preset "default" or "full", or of the list given (which may hold presets), in the table's order.

    Raises ValueError naming what is unknown, and for an empty list, which would record nothing.
    """
    if not isinstance(diagnostics, Iterable) or not all(isinstance(name, str) for name in diagnostics):
        raise ValueError(f"diagnostics={diagnostics!r} is not understood: use 'default', 'full', or a list of names")
    if not (listed := _listed(diagnostics)):
        raise ValueError(
            f"diagnostics={diagnostics!r} would record no number: name at least one, as ['kernel_angle'], or leave it "
            "out for the default ones"
        )
    wanted: set[str] = set()
    for name in listed:
        wanted |= PRESETS[name]() if name in PRESETS else {name}
    unknown = sorted(wanted - set(DIAGNOSTICS))
    if unknown:
        raise ValueError(
            f"unknown diagnostics {', '.join(map(_with_close, unknown))}: use 'default', 'full', or a list of names; "
            "`ntkwatch explain` lists them with what they mean"
        )
    wanted |= {other for name in wanted for other in DIAGNOSTICS[name].beside}
    return tuple(name for name in DIAGNOSTICS if name in wanted)


def _with_close(name: str) -> str:
    """An unknown name, and those that it may stand for."""
    known = [*PRESETS, *DIAGNOSTICS]
    close = difflib.get_close_matches(name, known, n=2) or [other for other in known if name and name in other][:3]
    return f"{name!r} (did you mean {' or '.join(close)}?)" if close else repr(name)


PRESETS: dict[str, Callable[[], set[str]]] = {
    "default": lambda: {name for name, diagnostic in DIAGNOSTICS.items() if diagnostic.default},
    "full": lambda: {name for name, diagnostic in DIAGNOSTICS.items() if not diagnostic.by_name},
}


def _listed(diagnostics: str | Sequence[str]) -> list[str]:
    return [diagnostics] if isinstance(diagnostics, str) else list(diagnostics)


def names_forecast(diagnostics: str | Sequence[str]) -> bool:
    """Whether a diagnostic that needs every training batch is asked for by its own name, not by a preset."""
    return any(name in DIAGNOSTICS and "forecast" in DIAGNOSTICS[name].needs for name in _listed(diagnostics))


def needs_limit(names: Sequence[str]) -> bool:
    """Whether one of these needs the infinitely wide network's kernels."""
    return any({"limit", "nngp"} & {*DIAGNOSTICS[name].needs} for name in names)


def reduction(names: Sequence[str]) -> str:
    """The richest reduction that these diagnostics need: "any", "blocks" or "full"."""
    needed = [DERIVED_FROM.index(DIAGNOSTICS[name].reduction) for name in names]
    return DERIVED_FROM[max(needed, default=0)]


def costs(names: Sequence[str], own: str = "trace") -> dict[str, list[str]]:
    """What these diagnostics cost beyond one kernel, in words -> the names that ask for it; in the table's order.

    own: the run's reduction, from which poorer ones follow.
    """
    found: dict[str, list[str]] = {}
    held = DERIVED_FROM.index(own) if own in DERIVED_FROM else 0
    for name in names:
        if DERIVED_FROM.index(needed := DIAGNOSTICS[name].reduction) > held:
            found.setdefault(f"a kernel reduced to {needed!r}", []).append(name)
    return found | {price.text: asked for price, asked in prices(names).items()}


def prices(names: Sequence[str]) -> dict[Price, list[str]]:
    """The same as units that a plan can price, without the richer kernel."""
    found: dict[Price, list[str]] = {}
    for name in names:
        if (price := DIAGNOSTICS[name].cost) is not None:
            found.setdefault(price, []).append(name)
    return found


def evaluate(names: Sequence[str], view: View) -> tuple[dict[str, float | None], dict[str, str]]:
    """(values, reasons): every name that exists for this model; an undefined one is None and has a reason."""
    values: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for name in names:
        diagnostic = DIAGNOSTICS[name]
        if diagnostic.when(view):
            values[name], reason = defined(partial(diagnostic.compute, view))
            if reason is not None:
                reasons[name] = reason
    return values, reasons

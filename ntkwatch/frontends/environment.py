"""Zero-line use: `NTKWATCH=1 python train.py` puts the callback into every Trainer; without the variable, nothing.

Lightning asks for callbacks through the entry points in pyproject.toml whenever a Trainer is made, so this room imports
nothing of size before the variable is set.
"""

from __future__ import annotations

import ast
import inspect
import os
from typing import Any

VARIABLE = "NTKWATCH"
STATE_KEY = "NTKWatch from the environment"  # Lightning refuses two callbacks whose checkpoints' states share a name
_OFF = ("", "0")
_HELP = f"say {VARIABLE}=1, or arguments of NTKWatch: {VARIABLE}='probes=32 every=100 diagnostics=full'"


def callbacks() -> list[Any]:
    """What a Trainer is given: one NTKWatch where the variable is set, to 1 or to the callback's arguments.

    Raises:
        ValueError: the variable holds something else.
    """
    said = os.environ.get(VARIABLE, "").strip()
    if said in _OFF:
        return []
    from ntkwatch.frontends.lightning import NTKWatch

    try:
        watch = NTKWatch(**({} if said == "1" else _arguments(said, set(inspect.signature(NTKWatch).parameters))))
    except ValueError as error:
        raise ValueError(f"the environment variable {VARIABLE}={said!r}: {error}") from None
    watch.state_key = STATE_KEY
    return [watch]


def _arguments(said: str, known: set[str]) -> dict[str, Any]:
    """name=value, separated by spaces; values are Python's, or words."""
    found: dict[str, Any] = {}
    for part in said.split():
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{part!r} is no argument: {_HELP}")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found

"""FILE:FACTORY, and other things that a command names in Python files: found, called, and what goes wrong in words."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

from torch import nn

MAX_MESSAGE_LENGTH = 400  # characters of somebody else's error
READY_MADE_OUTPUTS = "ntkwatch.outputs"  # where a bare name is looked for last


class FactoryError(ValueError):
    """A name that does not lead to what it should: what, got, do this."""


class Factory:
    """FACTORY() of FILE:FACTORY, which returns (model, batch)."""

    def __init__(self, spec: str) -> None:
        file, colon, self.name = spec.rpartition(":")
        self.path = Path(file)
        if not colon or not self.name or not self.path.is_file():
            why = f"there is no file {file}; " if colon and self.name else ""
            raise FactoryError(
                f"{spec} does not name a factory: {why}give FILE:FACTORY, for example train.py:model_and_batch"
            )
        self._module = _module(self.path)

    def build(self) -> tuple[nn.Module, Any]:
        """The model and the batch."""
        factory = getattr(self._module, self.name, None)
        if not callable(factory):
            raise FactoryError(f"{self.path} has no function {self.name}: define one that returns (model, batch)")
        try:
            made = factory()
        except Exception as error:
            raise FactoryError(f"{self.name}() in {self.path} raised {describe_error(error)}") from error
        if not (isinstance(made, tuple | list) and len(made) == 2 and isinstance(made[0], nn.Module)):
            raise FactoryError(
                f"{self.name}() returned {_kind(made)}: it must return (model, batch), an nn.Module and a batch"
            )
        return made[0], made[1]

    def named(self, option: str, spec: str | None) -> Any:
        """What an option names: FILE:NAME, a NAME in the factory's file, or one of ntkwatch.outputs; None for None."""
        if spec is None:
            return None
        file, colon, name = spec.rpartition(":")
        if colon and not Path(file).is_file():
            raise FactoryError(f"{option} {spec}: there is no file {file}; give FILE:NAME or a name in {self.path}")
        module = self._module if not colon or Path(file).samefile(self.path) else _module(Path(file))
        places = [module] if colon else [module, _ready_made()]
        for place in places:
            if hasattr(place, name):
                return getattr(place, name)
        where_not = " nor ".join(
            str(p) for p in ([file] if colon else [self.path, *([READY_MADE_OUTPUTS] if places[1] else [])])
        )
        raise FactoryError(f"{option} {spec}: {where_not} has no {name}; define it there, or give FILE:NAME")


def describe_error(error: Exception) -> str:
    """The error and the line that raised it, in one line: the last that is not torch's own, where there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent.parent)
    theirs = [f for f in frames if "/torch/" not in f.filename.replace(os.sep, "/") and not f.filename.startswith(own)]
    last = (theirs or list(frames))[-1]
    return f"{type(error).__name__}: {_in_one_line(str(error))} (line {last.lineno} of {Path(last.filename).name})"


def _ready_made() -> Any:
    return (
        importlib.import_module(READY_MADE_OUTPUTS)
        if importlib.util.find_spec(READY_MADE_OUTPUTS) is not None
        else None
    )


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_ntkwatch_doctor_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{path} is not a Python file: give FILE:FACTORY, for example train.py:model_and_batch")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look a module up by its name
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FactoryError(f"{path} cannot be imported: {describe_error(error)}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def _in_one_line(message: str) -> str:
    """Its lines one after the other, and not more of them than can be read."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return textwrap.shorten(" / ".join(lines), MAX_MESSAGE_LENGTH, placeholder=" …") or "no message"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(item).__name__ for item in value)}"
    return type(value).__name__

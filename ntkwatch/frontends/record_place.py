"""Where a run's record goes: beside what its logger writes, on a disk of this machine."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkwatch.record import safe_name

HOME = "ntkwatch"
REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(/|:|$)")  # a URL or dbfs:/…; C:\… is a drive of Windows


@dataclass(frozen=True)
class Place:
    """A folder for a record. is_log: a logger named it, so that no other log's run goes there; said: what was left."""

    folder: Path
    is_log: bool
    said: str | None = None


def place_of(trainer: Any) -> Place:
    """<log_dir>/ntkwatch, else <save_dir or default_root_dir>/ntkwatch/<id>; a logger that has no folder here, or
    fails to say so, is passed over."""
    left: list[str] = []
    for folder in _folders(trainer.loggers, "log_dir", left):
        return Place(folder / HOME, True, _said(left, folder / HOME))
    root = next(_folders(trainer.loggers, "save_dir", left), None) or _root(trainer, left)
    name = next((named for logger in trainer.loggers[:1] if (named := _name(logger))), None)
    folder = root / HOME / safe_name(name or time.strftime("run-%Y%m%d-%H%M%S"))
    return Place(folder, name is not None, _said(left, folder))


def _folders(loggers: Any, attribute: str, left: list[str]) -> Iterator[Path]:
    """The folders that loggers tell, as far as they are here; `left` learns of the others."""
    for logger in loggers:
        try:
            told = getattr(logger, attribute, None)
            told = os.fspath(told) if isinstance(told, str | os.PathLike) else None
        except Exception as error:  # a property may ask a server
            left.append(f"{type(logger).__name__}.{attribute} fails ({type(error).__name__}: {str(error)[:200]})")
            continue
        if isinstance(told, str) and REMOTE.match(told):
            left.append(f"{type(logger).__name__}.{attribute} is no folder of this machine ({told})")
        elif isinstance(told, str) and told:
            yield Path(told)


def _root(trainer: Any, left: list[str]) -> Path:
    return next(_folders([trainer], "default_root_dir", left), None) or Path.cwd()


def _name(logger: Any) -> str | None:
    try:
        return f"{logger.name}-{logger.version}"
    except Exception:
        return None


def _said(left: list[str], folder: Path) -> str | None:
    return f"{'; '.join(dict.fromkeys(left))}: the record is in {folder.absolute()}" if left else None

"""A checkpoint's state of NTKWatch: its version, what it must hold, and where its record is now.

It comes from a file, maybe of another version or another hand: nothing of it is used before it is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntkwatch.record import DamagedRecord, read_manifest
from ntkwatch.record.schema import is_count, is_number

VERSION = 1  # of the state; states of before it was counted have none
LONGEST = 4096  # characters of a path
Check = Callable[[Any], bool]


def usable(state: Any, near: Iterable[Path] = ()) -> dict[str, Any] | None:
    """The state with its record where it is now, None where it has measured nothing; ValueError says what is wrong.

    near: folders from which a record that has moved may be found.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"it is a {type(state).__name__}")
    version = state.get("version", 0)
    if not is_count(version) or version > VERSION:
        said = version if is_count(version) else "that is no number"
        raise ValueError(f"it is of version {said}, this ntkwatch reads up to {VERSION}")
    _check(state, STATE, "")
    if not state["session"]:
        return None
    _check(state["session"], SESSION, "session.")
    session = dict(state["session"])
    session["record"] = str(_located(session["record"], session.get("id"), near))
    values = {name: float(value) for name, value in state["values"].items() if name.startswith("ntk/")}
    return {**state, "session": session, "values": values}


def _check(state: Mapping[str, Any], entries: Mapping[str, Check], where: str) -> None:
    for name, check in entries.items():
        if name.endswith("?"):
            if state.get(name[:-1]) is None:
                continue
            name = name[:-1]
        elif name not in state:
            raise ValueError(f"it lacks {where}{name}")
        if not check(state[name]):
            raise ValueError(f"its {where}{name} is not what a state holds")


def _clock(value: Any) -> bool:
    """The state of a Schedule; one of an older version may lack an entry."""
    return isinstance(value, Mapping) and all(name not in value or check(value[name]) for name, check in CLOCK.items())


def _seconds(value: Any) -> bool:
    return is_number(value) and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and "\0" not in value


def _kernel(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return plain and value.is_floating_point() and bool(torch.isfinite(value).all())


def _values(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and is_number(v) for k, v in value.items())


def _texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_text, value.values()))


CLOCK: dict[str, Check] = {
    "first": lambda value: value is None or is_count(value),
    "seen": lambda value: value == -1 or is_count(value),
    "last_fired": lambda value: value is None or is_count(value),
    "level": lambda value: is_count(value) and value <= 64,
    "first_cost": _seconds,
    "costs": lambda value: isinstance(value, list | tuple) and len(value) <= 100 and all(map(_seconds, value)),
    "aside": _seconds,
    "spent": _seconds,
    "elapsed": _seconds,
}
STATE: dict[str, Check] = {
    "step": is_count,
    "schedule": _clock,
    "grid": _clock,
    "values": _values,
    "session": lambda value: isinstance(value, Mapping),
}
SESSION: dict[str, Check] = {
    "record": _text,
    "probe_hash": _text,
    "id?": _text,
    "previous_step?": is_count,
    "previous_kernel?": _kernel,
    "forecast?": _texts,
}


def _located(record: str, identity: str | None, near: Iterable[Path]) -> Path:
    """The record's folder: as it was written, or where the run's folder has been copied or moved to.

    A copy that lies with the checkpoint comes before the original. The record of a state of before
    records had an identity is looked for elsewhere only where nothing is left at its path.
    """
    written = Path(record)
    moved = (place for folder in near for place in _places(written, folder))
    if identity is None:
        return written if _identity(written) is not None else next((p for p in moved if _identity(p) == ""), written)
    return next((place for place in moved if _identity(place) == identity), written)


def _places(record: Path, folder: Path) -> Iterator[Path]:
    """Where the record would be if `folder` or one above it were a copy of one of the record's own: the last parts of
    its path, the longest first."""
    parts = record.parts[1:] if record.is_absolute() else record.parts
    for above in (folder, *folder.parents):
        for length in range(min(len(parts), 4), 0, -1):
            yield above.joinpath(*parts[-length:])


def _identity(folder: Path) -> str | None:
    """What tells the record there from others, "" where it is older than that, None where there is no record."""
    try:
        return str(read_manifest(folder).get("id") or "")
    except (DamagedRecord, OSError, ValueError):
        return None


def near(trainer: Any, log: Path) -> list[Path]:
    """Where to look for a record that has moved: with the checkpoint, and with the log."""
    checkpoint = getattr(trainer, "ckpt_path", None)
    if isinstance(checkpoint, str | os.PathLike) and checkpoint:
        return [Path(os.path.abspath(os.fspath(checkpoint))).parent, log.parent]
    return [log.parent]

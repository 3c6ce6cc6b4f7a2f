"""A branch: a run that begins with a part of another's record, and goes on in a record of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ntkwatch.record.format import (
    INDEX,
    SNAPSHOTS,
    encode_line,
    path_inside,
    read_manifest,
    sync_folder,
    write_atomic,
    write_manifest,
)
from ntkwatch.record.run import read_index
from ntkwatch.record.writer import RecordWriter, new_id


def branch(
    folder: Path, parent: Path, step: int, changes: Mapping[str, Any], side_files: Iterable[str] = ()
) -> RecordWriter:
    """Write into `folder` what `parent` holds up to and including `step`, and return what continues it there.

    changes: to the parent's manifest. side_files: names of tensor files inside the parent that belong to that part.
    The parent is only read, and may be written by its own run meanwhile. RecordError where it is damaged.
    """
    manifest = read_manifest(parent)
    rows = [row for at, row in read_index(parent).items() if at <= step]
    for row in rows:
        name = f"{row['snapshot']['name']}.safetensors"
        _share(path_inside(parent, SNAPSHOTS, name), path_inside(folder, SNAPSHOTS, name))
    for name in side_files:
        _share(path_inside(parent, f"{name}.safetensors"), path_inside(folder, f"{name}.safetensors"))
    lines = [encode_line({"line": i, **_body(row)}) for i, row in enumerate(rows, start=1)]
    write_atomic(folder / INDEX, b"".join(lines))
    own = {
        "id": new_id(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "parent": {"record": _from(folder, parent), "step": int(step)},
    }
    write_manifest(folder, manifest | dict(changes) | own)  # last: a folder with a manifest is a whole record
    return RecordWriter.resume(folder, step)


def _body(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "line"}


def _share(source: Path, target: Path) -> None:
    """The same bytes under another name: a file of a record is never written again. A copy, where links cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # of a branch that was killed before its manifest
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("r+b") as file:
            os.fsync(file.fileno())
    sync_folder(target.parent)


def _from(folder: Path, parent: Path) -> str:
    """The way from a record to its parent, so that both may be moved together; absolute where there is none."""
    try:
        return os.path.relpath(parent.resolve(), folder.resolve())
    except ValueError:  # another drive of Windows
        return str(parent.resolve())

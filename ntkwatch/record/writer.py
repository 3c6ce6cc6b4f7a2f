"""The one who writes a record: rank 0 of the run."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ntkwatch.record.format import (
    INDEX,
    MANIFEST,
    SNAPSHOTS,
    TEMPORARY,
    decode_line,
    encode_line,
    json_ready,
    path_inside,
    read_manifest,
    save_tensors,
    write_atomic,
    write_manifest,
)
from ntkwatch.record.measurement import Measurement
from ntkwatch.record.run import read_index
from ntkwatch.record.schema import LAYER_PREFIX, LIMIT, LIMIT_NNGP, LIMIT_ROWS, SCHEMA


class RecordWriter:
    """Writes one record; made by ``create`` or ``resume``. What fails raises OSError and leaves the record readable."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._size = -1  # of the index after our last append; -1: not looked at yet
        self._lines = 0

    @classmethod
    def create(cls, folder: Path | str, manifest: Mapping[str, Any]) -> RecordWriter:
        """A new, empty record; FileExistsError where ``folder`` already is a run's record."""
        folder = Path(folder)
        if os.path.lexists(folder / MANIFEST):
            raise FileExistsError(
                f"{folder} already holds the record of a run; choose another folder, or resume that run."
            )
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        writer = cls(folder, json_ready({"schema": SCHEMA, "id": new_id(), "created": created} | dict(manifest)))
        write_atomic(folder / INDEX, b"")
        write_manifest(folder, writer.manifest)  # last: a folder with a manifest is a whole record
        return writer

    @classmethod
    def resume(cls, folder: Path | str, step: int) -> RecordWriter:
        """Continue a record from a checkpoint at ``step``: what was written of later steps no longer counts.

        RecordError if the record is missing or damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        read_index(folder)
        for left_over in [*folder.glob(TEMPORARY), *(folder / SNAPSHOTS).glob(TEMPORARY)]:
            left_over.unlink(missing_ok=True)  # of a writer that was killed
        writer = cls(folder, manifest)
        writer._append({"resumed_at": int(step)})
        return writer

    def append(self, m: Measurement, save_kernels: bool = True) -> None:
        """Add one measurement; without ``save_kernels`` its snapshot holds only eigenvalues and outputs.

        A value that is not finite is written as undefined. Appending a step again replaces it.
        """
        if m.step < 0:
            raise ValueError(f"a measurement's step counts from 0, got {m.step}; pass the steps completed.")
        name = self._free_name(m.step)
        sha256 = save_tensors(self.folder / SNAPSHOTS, name, _tensors(m, save_kernels))
        reasons = {key: f"the value was {value}" for key, value in m.metrics.items() if value is not None} | m.reasons
        self._append(
            {
                "step": int(m.step),
                "global_step": None if m.global_step is None else int(m.global_step),
                "epoch": None if m.epoch is None else int(m.epoch),
                "seconds": float(m.seconds),
                "metrics": _defined(m.metrics),
                "reasons": {key: reason for key, reason in reasons.items() if not _finite(m.metrics.get(key))},
                "layer_metrics": {module: _defined(values) for module, values in m.layer_metrics.items()},
                "context": json_ready(m.context),
                "snapshot": {"name": name, "sha256": sha256},
            }
        )

    def update_manifest(self, **changes: Any) -> None:
        """Add or replace entries of the manifest, all at once."""
        self.manifest = self.manifest | json_ready(changes)
        write_manifest(self.folder, self.manifest)

    def _free_name(self, step: int) -> str:
        """A snapshot is never written over: an old line, or a reader that holds one, may still point at it."""
        name, attempt = f"step_{step:08d}", 1
        while path_inside(self.folder, SNAPSHOTS, f"{name}.safetensors").exists():
            name, attempt = f"step_{step:08d}_{attempt}", attempt + 1
        return name

    def _append(self, body: dict[str, Any]) -> None:
        handle = os.open(self.folder / INDEX, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(handle).st_size
            if size != self._size:
                size, self._lines = _repair_last_line(handle, (self.folder / INDEX).read_bytes())
            line = encode_line({"line": self._lines + 1} | body)
            try:
                written = os.write(handle, line)
                if written < len(line):
                    raise OSError(
                        f"{self.folder / INDEX}: only {written} of {len(line)} bytes were written; free some space."
                    )
                os.fsync(handle)
            except OSError:
                self._size = -1
                os.ftruncate(handle, size)
                raise
            self._size, self._lines = size + len(line), self._lines + 1
        finally:
            os.close(handle)


def new_id() -> str:
    """What tells a record from another at the same place; copies of a record have one."""
    return secrets.token_hex(8)


def _repair_last_line(handle: int, data: bytes) -> tuple[int, int]:
    """End the index on a whole line: a last one cut short is cut off, one that lacks only its newline gets it."""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        try:
            decode_line(data[end:])
        except ValueError:
            os.ftruncate(handle, end)
        else:
            os.write(handle, b"\n")
            end = len(data) + 1
    return end, data.count(b"\n", 0, end) + (end > len(data))


def _tensors(m: Measurement, save_kernels: bool) -> dict[str, Tensor]:
    tensors = {"eigenvalues": m.eigenvalues}
    if m.outputs is not None:
        tensors["outputs"] = m.outputs
    if save_kernels:
        tensors["kernel"] = m.kernel
        if m.limit is not None:
            tensors |= {LIMIT: m.limit.kernel, LIMIT_ROWS: m.limit.rows}
            tensors |= {} if m.limit.nngp is None else {LIMIT_NNGP: m.limit.nngp}
        tensors |= {LAYER_PREFIX + name: kernel for name, kernel in m.layers.items()}
    return tensors


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _defined(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: float(value) if value is not None and math.isfinite(value) else None for name, value in values.items()
    }

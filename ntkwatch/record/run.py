"""Reading records back, also while a run writes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from ntkwatch.record.format import (
    INDEX,
    MANIFEST,
    MAX_FILE_BYTES,
    SNAPSHOTS,
    DamagedRecord,
    RecordError,
    decode_line,
    load_tensors,
    path_inside,
    read_bytes,
    read_manifest,
)
from ntkwatch.record.measurement import Limit, Measurement
from ntkwatch.record.schema import LAYER_PREFIX, LIMIT, LIMIT_NNGP, LIMIT_ROWS, check_row, check_tensors, is_number

RECORD_FOLDER = "ntkwatch"  # the record's folder inside a logger's
WIDTH_NAMES = (
    *("width", "hidden_size", "d_model", "hidden_dim", "hidden_width", "hidden_features", "hidden_units", "n_hidden"),
    *("num_hidden", "n_units", "n_embd", "embed_dim", "embedding_dim", "model_dim", "base_width", "hidden"),
)
_REPAIR = "restore the file from a copy, or cut it before that line to keep the earlier probes"


class Run:
    """One run's record, as it was when it was loaded; kernels are read from disk when asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], rows: dict[int, dict[str, Any]]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = rows
        self.others: list[Path] = []  # earlier records of the same log: of another fit, or left for a branch

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {len(self._rows)} probes, last step {max(self._rows, default=None)})"

    @property
    def steps(self) -> list[int]:
        """The probed steps, ascending."""
        return list(self._rows)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """[steps, metrics] float64, indexed by step; NaN where a value is undefined, and ``reasons`` says why."""
        return _frame({step: row["metrics"] for step, row in self._rows.items()})

    @cached_property
    def layer_metrics(self) -> pd.DataFrame:
        """[steps, (module, metric)] float64, indexed by step: ``run.layer_metrics["net.0"]["share"]`` is a curve."""
        rows = {step: _flatten(row["layer_metrics"]) for step, row in self._rows.items()}
        frame = _frame(rows)
        frame.columns = pd.MultiIndex.from_tuples(list(frame.columns), names=["module", "metric"])
        return frame

    @cached_property
    def probes(self) -> pd.DataFrame:
        """[steps, 3] indexed by step: ``global_step``, ``epoch`` and ``seconds`` of each probe, NaN where unknown."""
        names = ("global_step", "epoch", "seconds")
        return _frame({step: {name: row[name] for name in names} for step, row in self._rows.items()})

    @property
    def reasons(self) -> dict[int, dict[str, str]]:
        """By step, for each undefined metric: why, in one sentence."""
        return {step: dict(row["reasons"]) for step, row in self._rows.items()}

    def context(self, step: int) -> dict[str, Any]:
        """What the numbers of ``step`` are numbers of: reduction, engine, mode, probe hash, precision …"""
        return dict(self._row(step)["context"])

    def kernel(self, step: int) -> Tensor:
        """The kernel at ``step``, in the reduction it was measured in; RecordError if kernels were not saved."""
        return self._tensor(step, "kernel")

    def layers(self, step: int) -> dict[str, Tensor]:
        """[n, n] kernels by parameter name at ``step``; RecordError if kernels were not saved."""
        tensors = self._snapshot(step)
        if "kernel" not in tensors:
            raise self._absent(step, "kernel")
        return {
            name.removeprefix(LAYER_PREFIX): kernel for name, kernel in tensors.items() if name.startswith(LAYER_PREFIX)
        }

    def eigenvalues(self, step: int) -> Tensor:
        """[n] (or [n·C] under the full reduction), descending."""
        return self._tensor(step, "eigenvalues")

    def outputs(self, step: int) -> Tensor:
        """[n, C] outputs at the probes; RecordError if they were not saved."""
        return self._tensor(step, "outputs")

    @property
    def limit(self) -> Limit:
        """The infinite-width kernel that the first one tends to; RecordError where the run did not compute it."""
        if (found := self._limit(self._first)) is None:
            why = self.reasons.get(self._first, {}).get(
                "distance_to_infinite", "distance_to_infinite was not asked for"
            )
            raise RecordError(f"{self.folder} holds no infinite-width limit: {why}.")
        return found

    @property
    def _first(self) -> int:
        return self.steps[0] if self.steps else 0

    def _limit(self, step: int) -> Limit | None:
        tensors = self._snapshot(step)
        if LIMIT not in tensors:
            return None
        return Limit(tensors[LIMIT], tensors[LIMIT_ROWS], tensors.get(LIMIT_NNGP))

    def measurement(self, step: int) -> Measurement:
        """The whole measurement of ``step``, as it was appended; RecordError if kernels were not saved."""
        names = ("metrics", "reasons", "seconds", "layer_metrics", "global_step", "epoch", "context")
        return Measurement(
            step=step,
            kernel=self.kernel(step),
            layers=self.layers(step),
            eigenvalues=self.eigenvalues(step),
            outputs=self._snapshot(step).get("outputs"),
            limit=self._limit(step),
            **{name: self._row(step)[name] for name in names},
        )

    @property
    def width(self) -> float | None:
        """The width among the hyperparameters: ``width`` or a common synonym (hidden_size, d_model …), else None."""
        return next((value for name in WIDTH_NAMES if (value := self.hparam(name)) is not None), None)

    def hparam(self, name: str) -> float | None:
        """A hyperparameter as a number, also by its last name in a nested mapping; None if absent or not one number."""
        return _find(self.manifest.get("hparams") or {}, name)

    def _row(self, step: int) -> dict[str, Any]:
        if step not in self._rows:
            known = ", ".join(map(str, self.steps[:8])) + (f", … {self.steps[-1]}" if len(self.steps) > 8 else "")
            raise RecordError(f"{self.folder} has no probe at step {step}; its steps are {known or 'none yet'}.")
        return self._rows[step]

    def _snapshot(self, step: int) -> dict[str, Tensor]:
        snapshot = self._row(step)["snapshot"]
        tensors = load_tensors(path_inside(self.folder, SNAPSHOTS), snapshot["name"], snapshot["sha256"])
        try:
            check_tensors(tensors)
        except ValueError as error:
            raise DamagedRecord(
                f"{self.folder}, the snapshot of step {step}: {error}; restore it from a copy."
            ) from error
        return tensors

    def _tensor(self, step: int, name: str) -> Tensor:
        tensors = self._snapshot(step)
        if name not in tensors:
            raise self._absent(step, name)
        return tensors[name]

    def _absent(self, step: int, name: str) -> RecordError:
        return RecordError(f"{self.folder} holds no {name} at step {step}; record the run with save_kernels=True.")


def load_run(path: Path | str) -> Run:
    """The run recorded in ``path``: a record, or a folder with exactly one below it (a logger's ``version_0``).

    Of several records of one log (`ntkwatch`, `ntkwatch-2`: two fits, or a run and its branch) it is the newest, and
    `others` names the rest. RecordError, in one sentence, if there is none, if several logs hold one, or if what is
    there is damaged.
    """
    found = find_runs([path])
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found[:3])
        raise RecordError(
            f"{path} holds {len(found)} records ({names}{', …' if len(found) > 3 else ''}); pass one of them."
        )
    run = Run(found[0], read_manifest(found[0]), read_index(found[0]))
    run.others = [] if Path(path) == found[0] else _siblings(found[0])[:-1]
    return run


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """The record folders at or below ``paths``, in that order, each once, of each log the newest; RecordError if there
    is none."""
    folders = [Path(path) for path in paths]
    for path in folders:
        if not path.is_dir():
            raise RecordError(f"{path} is not a folder; pass a run's folder, for example lightning_logs/version_0.")
    found = list(dict.fromkeys(folder for path in folders for folder in _records(path)))
    if not found:
        where = ", ".join(str(path) for path in folders[:3]) + (", …" if len(folders) > 3 else "")
        raise RecordError(
            f"{where or 'the empty list'} holds no record of ntkwatch (no {RECORD_FOLDER}/{MANIFEST}); "
            "pass a run's folder."
        )
    return found


def read_index(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows that count, by ascending step. A last line still being written is passed over; other damage raises."""
    path = folder / INDEX
    data = read_bytes(path, MAX_FILE_BYTES[INDEX])
    try:
        return _rows(path, data)
    except RecordError:
        again = read_bytes(path, MAX_FILE_BYTES[INDEX])  # a resuming writer may have cut a torn line off while we read
        if again == data:
            raise
        return _rows(path, again)


def _rows(path: Path, data: bytes) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    *lines, tail = data.split(b"\n")
    for number, line in enumerate([*lines, tail] if tail else lines, start=1):
        try:
            row = decode_line(line)
            check_row(row, number)
        except ValueError as error:
            if number > len(lines):
                break  # cut short: it was never committed
            raise DamagedRecord(f"{path}, line {number} is damaged: {error}; {_REPAIR}.") from error
        if "resumed_at" in row:
            rows = {step: kept for step, kept in rows.items() if step <= row["resumed_at"]}
        else:
            rows[row["step"]] = row
    return dict(sorted(rows.items()))


def _frame(rows: Mapping[int, Mapping[Any, float | None]]) -> pd.DataFrame:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    values = [[row.get(name) for name in columns] for row in rows.values()]
    return pd.DataFrame(
        values, index=pd.Index(list(rows), name="step", dtype="int64"), columns=pd.Index(columns), dtype="float64"
    )


def _flatten(layers: Mapping[str, Mapping[str, float | None]]) -> dict[tuple[str, str], float | None]:
    return {(module, name): value for module, values in layers.items() for name, value in values.items()}


def _find(hparams: Any, name: str) -> float | None:
    if not isinstance(hparams, Mapping):
        return None
    value = hparams.get(name)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]  # hidden_size=[512, 512] is one width
    if is_number(value):
        return float(value)
    return next((found for item in hparams.values() if (found := _find(item, name)) is not None), None)


def _records(path: Path) -> list[Path]:
    if _holds(path, MANIFEST, INDEX) or (path.name == RECORD_FOLDER and _holds(path, MANIFEST)):
        return [path]
    if _holds(path / RECORD_FOLDER, MANIFEST):
        return _siblings(path / RECORD_FOLDER)[-1:]
    found: list[Path] = []
    for parent, below, files in os.walk(path):
        if MANIFEST in (held := {*files, *below}) and (INDEX in held or Path(parent).name == RECORD_FOLDER):
            found.append(Path(parent))
            below.clear()
    return list(dict.fromkeys(_siblings(folder)[-1] for folder in sorted(found, key=_natural)))


def _holds(folder: Path, *names: str) -> bool:
    """Whether all of these are there, be they files or not: what is damaged is no folder without a record."""
    return all(os.path.lexists(folder / name) for name in names)


def _siblings(record: Path) -> list[Path]:
    """The records of one log, oldest first: `ntkwatch`, `ntkwatch-2`, …; a record whose name is none of these alone."""
    stem = re.sub(r"-\d+$", "", record.name)
    first = record.with_name(stem) if _holds(record.with_name(stem), MANIFEST, INDEX) else record
    numbered = re.compile(re.escape(first.name) + r"-\d+")
    others = [p for p in first.parent.glob("*") if numbered.fullmatch(p.name) and _holds(p, MANIFEST, INDEX)]
    return [first, *sorted(others, key=_natural)]


def _natural(path: Path) -> list[tuple[int, str | int]]:
    """version_2 before version_10."""
    return [(1, int(part)) if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]

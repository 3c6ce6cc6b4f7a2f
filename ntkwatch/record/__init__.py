"""What was measured, and the only file format it is kept in.

A record is a folder::

    manifest.json   what the run is: schema, versions, parameters, probes, reduction, engine, hyperparameters; a sha256
    metrics.jsonl   the index: one JSON line a probe, each with its number and a CRC; undefined is null, never NaN
    snapshots/      step_00000008.safetensors: eigenvalues, outputs, kernel, layer kernels; sha256 in the index line

A snapshot is written whole (temporary file in the same folder, fsync, rename) before its index line and is never
written again: the index line is the commit. So a reader may look at any time, a killed writer leaves nothing worse
than a last line cut short (readers pass over it, the next append cuts it off), and a byte changed later is an error,
not a number. A resumed run appends ``{"resumed_at": step}``: earlier lines with a larger step no longer count.
One run at a time owns a record (``ownership``); one that begins with a part of another's has a record of its own, whose
manifest names its ``parent`` (``branch``).
No pickle anywhere.
"""

from __future__ import annotations

from ntkwatch.record.branch import branch
from ntkwatch.record.format import (
    MANIFEST,
    DamagedRecord,
    RecordError,
    load_tensors,
    read_manifest,
    safe_name,
    save_tensors,
)
from ntkwatch.record.measurement import Limit, Measurement
from ntkwatch.record.ownership import Owner, RecordInUse, acquire, acquire_free
from ntkwatch.record.run import Run, find_runs, load_run
from ntkwatch.record.schema import SCHEMA
from ntkwatch.record.tensor_store import FORECASTS, TensorStore
from ntkwatch.record.writer import RecordWriter

__all__ = [
    "FORECASTS",
    "MANIFEST",
    "SCHEMA",
    "DamagedRecord",
    "Limit",
    "Measurement",
    "Owner",
    "RecordError",
    "RecordInUse",
    "RecordWriter",
    "Run",
    "TensorStore",
    "acquire",
    "acquire_free",
    "branch",
    "find_runs",
    "load_run",
    "load_tensors",
    "read_manifest",
    "safe_name",
    "save_tensors",
]

"""Bytes on disk: safe names, atomic files, checksummed tensors, sealed lines; what a record is made of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ntkwatch.record.schema import SCHEMA, check_depth, check_manifest, is_count

MANIFEST, INDEX, SNAPSHOTS = "manifest.json", "metrics.jsonl", "snapshots"
TEMPORARY = ".*.tmp"
MAX_FILE_BYTES = {MANIFEST: 64 << 20, INDEX: 1 << 30}  # bytes: beyond what any run writes, within what a machine reads
MAX_TENSOR_BYTES = 16 << 30
_LINE_CHECKSUM = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names on Windows
_MAX_NAME_LENGTH = 100  # leaves room for an extension and a temporary suffix under the usual 255 bytes


class RecordError(ValueError):
    """A record that is missing, damaged or not a record: what, where, and what to do."""


class DamagedRecord(RecordError):
    """A record that is there, with a file that is not what was written or not what this format holds."""


def safe_name(name: str) -> str:
    """A file name that stays in its folder: ``name`` itself if it is safe, else its safe part and a hash of the whole.

    >>> safe_name("version_0")
    'version_0'
    >>> safe_name("../../etc/passwd")
    'etc_passwd-3754d6cb'
    """
    fits = _SAFE.fullmatch(name) and not _RESERVED.fullmatch(name) and len(name) <= _MAX_NAME_LENGTH
    if fits and not name.endswith("."):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    part = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[: _MAX_NAME_LENGTH - 20]
    return f"{part or 'unnamed'}-{digest}"


def path_inside(root: Path, *parts: str) -> Path:
    """``root/parts``, refused where it would leave ``root`` (by ``..``, an absolute part or a link)."""
    path = root.joinpath(*parts)
    try:
        stays = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself; a name that no file can have
        stays = False
    if not stays:
        raise DamagedRecord(f"{path} lies outside the record {root}; restore the record from its source.")
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """All of ``data`` under ``path``, or the old file untouched: temporary file beside it, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data, lasting=True)
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes, lasting: bool = False) -> None:
    """The file, whole at any time that somebody reads it; `lasting`: after a power cut too."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:  # not tempfile, whose files are private: a group may share the folder
            file.write(data)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` outlive a power cut, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(folder: Path | str, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write ``<folder>/<safe_name(name)>.safetensors`` whole or not at all; returns the sha256 of its bytes."""
    # Clones: safetensors refuses tensors that share memory, as a one-layer model's kernel and layer kernel may.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    data = safetensors.torch.save(plain, metadata={"order": json.dumps(list(plain))})
    write_atomic(path_inside(Path(folder), f"{safe_name(name)}.safetensors"), data)
    return hashlib.sha256(data).hexdigest()


def load_tensors(folder: Path | str, name: str, sha256: str) -> dict[str, Tensor]:
    """What ``save_tensors(folder, name, …)`` wrote, in its order, on the CPU; RecordError if a byte has changed."""
    path = path_inside(Path(folder), f"{safe_name(name)}.safetensors")
    data = read_bytes(path, MAX_TENSOR_BYTES)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedRecord(f"{path} has changed since it was written (its checksum differs); restore it from a copy.")
    try:
        tensors = safetensors.torch.load(data)
        # safetensors keeps no order; sums over layers would come out in another rounding each time they are read.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {key: tensors[key] for key in json.loads(header["__metadata__"]["order"])}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DamagedRecord(
            f"{path} is not a safetensors file ({_one_line(error)}); restore it from a copy."
        ) from error


def encode_line(body: Mapping[str, Any]) -> bytes:
    """One line of the index: ``body`` as JSON with the CRC-32 of that JSON in front, newline at the end."""
    text = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    return b'{"crc":"%08x",' % zlib.crc32(text) + text[1:] + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The body of a sealed line without its newline; ValueError, saying what is wrong, if it is not what was sealed."""
    found = _LINE_CHECKSUM.match(line)
    if found is None:
        raise ValueError("it does not begin with its checksum")
    text = b"{" + line[found.end() :]
    if b"%08x" % zlib.crc32(text) != found[1]:
        raise ValueError("its checksum differs")
    return _json_object(text)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """``manifest.json``, indented for people, with a sha256 of the content under ``checksum``."""
    body = json_ready(manifest)
    text = json.dumps(body | {"checksum": _checksum(body)}, allow_nan=False, indent=1)
    write_atomic(folder / MANIFEST, text.encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it was written; DamagedRecord if it is missing, changed, or of an unknown schema."""
    path = folder / MANIFEST
    data = read_bytes(path, MAX_FILE_BYTES[MANIFEST])
    try:
        body = _json_object(data)
    except ValueError as error:
        raise DamagedRecord(f"{path} is damaged ({error}); restore it from a copy.") from error
    if body.pop("checksum", None) != _checksum(body):
        raise DamagedRecord(f"{path} has changed since it was written (its checksum differs); restore it from a copy.")
    schema = body.get("schema")
    if not is_count(schema) or not 1 <= schema <= SCHEMA:
        said = schema if is_count(schema) else "that is no number"
        raise DamagedRecord(
            f"{path} has schema {said}, this ntkwatch reads 1 to {SCHEMA}; install the ntkwatch that wrote it."
        )
    try:
        check_manifest(body)
    except ValueError as error:
        raise DamagedRecord(f"{path} is damaged: {error}; restore it from a copy.") from error
    return body


def json_ready(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers, text, lists, mappings; anything else, and inf or nan, as text."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_ready(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a numpy or torch scalar
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    return str(value)[:500]


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {_one_line(error)}") from error
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    check_depth(body)
    return body


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return body


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _one_line(error: BaseException) -> str:
    """A parser's message may hold what it could not parse: of that, one short line."""
    return " ".join(str(error).split())[:200]


def read_bytes(path: Path, largest: int) -> bytes:
    """All of a file; DamagedRecord where it is no file (a pipe, a device, a folder), too large, or cannot be read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DamagedRecord(f"{path} is not a file; restore it from a copy.")
        if found.st_size > largest:
            raise DamagedRecord(
                f"{path} is larger than any record's ({found.st_size:,} bytes); restore it from a copy."
            )
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "there is not enough memory"
        raise DamagedRecord(f"{path} cannot be read ({why}); restore it from a copy.") from error

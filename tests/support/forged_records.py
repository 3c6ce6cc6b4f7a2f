"""Records that somebody has forged: every checksum is right, and what it covers is not what this format holds.

`forge(folder, number)` turns the record in `folder` into the forgery of that number and returns what was done to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ntkwatch.record.format import decode_line

ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r\n\x9b31m"
DEEP: Any = 1
for _ in range(80):
    DEEP = [DEEP]
VALUES: dict[str, Any] = {
    "true": True,
    "null": None,
    "minus one": -1,
    "2^70": 2**70,
    "2^53 + 1": 2**53 + 1,
    "400 digits": 10**400,
    "minus 400 digits": -(10**400),
    "NaN": math.nan,
    "infinity": math.inf,
    "a half": 0.5,
    "1e308": 1e308,
    "the least float": 5e-324,
    "text": "x",
    "no text": "",
    "escapes": ESCAPES,
    "long text": "a" * 100_000,
    "a list": [1],
    "an empty list": [],
    "a list of escapes": [ESCAPES],
    "an object": {"a": 1},
    "an empty object": {},
    "an object of escapes": {ESCAPES: ESCAPES},
    "objects of objects": {"a": {"b": {"c": None}}},
    "deep": DEEP,
}
ROW = [
    ("step",), ("global_step",), ("epoch",), ("seconds",), ("metrics",), ("metrics", "kernel_angle"), ("reasons",),
    ("reasons", "taylor_ratio"), ("layer_metrics",), ("layer_metrics", "net.0"), ("layer_metrics", "net.0", "share"),
    ("context",), ("context", "reduction"), ("snapshot",), ("snapshot", "name"), ("snapshot", "sha256"), ("line",),
    ("resumed_at",), ("metrics", ESCAPES), ("layer_metrics", ESCAPES), ("unheard_of",), ("metrics", "overhead"),
]  # fmt: skip
MANIFEST = [
    ("schema",), ("created",), ("versions",), ("model",), ("parameters",), ("n_parameters",), ("n_outputs",),
    ("probes",), ("probes", "n"), ("probes", "hash"), ("probes", "source"), ("probes", "indices"), ("reduction",),
    ("engine",),
    ("mode",), ("precision",), ("optimizer",), ("hparams",), ("hparams", "width"), ("hparams", "seed"), ("budget",),
    ("every",), ("seed",), ("diagnostics",), ("infinite",), ("baseline",), ("failed_probes",), ("switched_off",),
    ("switched_off", "step"), ("switched_off", "why"), ("finished",), ("theta0",), ("parent",), ("id",),
    ("unheard_of",),
]  # fmt: skip
N = 8
TENSORS: dict[str, tuple[str, Any]] = {
    "a kernel that is not square": ("kernel", torch.ones(N, N + 1).double()),
    "a kernel of one axis": ("kernel", torch.ones(N).double()),
    "a kernel of no axis": ("kernel", torch.tensor(1.0).double()),
    "a kernel of five axes": ("kernel", torch.ones(1, 1, 1, 1, 1).double()),
    "a full kernel of unlike halves": ("kernel", torch.ones(2, 3, 3, 2).double()),
    "an empty kernel": ("kernel", torch.ones(0, 0).double()),
    "a kernel of whole numbers": ("kernel", torch.ones(N, N).long()),
    "a kernel of complex numbers": ("kernel", torch.ones(N, N, dtype=torch.complex64)),
    "a kernel of flags": ("kernel", torch.ones(N, N).bool()),
    "a kernel of other probes than its layers": ("kernel", torch.eye(N + 1).double()),
    "a kernel of NaN": ("kernel", torch.full((N, N), math.nan).double()),
    "a kernel of infinity": ("kernel", torch.full((N, N), math.inf).double()),
    "a kernel of zeros": ("kernel", torch.zeros(N, N).double()),
    "a kernel of half precision": ("kernel", torch.eye(N).half()),
    "a layer that is not square": ("layer:net.0.weight", torch.ones(N, 2).double()),
    "a layer of other probes": ("layer:net.0.weight", torch.eye(N - 1).double()),
    "a layer of an escaping name": (f"layer:{ESCAPES}", torch.eye(N).double()),
    "eigenvalues in a square": ("eigenvalues", torch.eye(N).double()),
    "eigenvalues of whole numbers": ("eigenvalues", torch.ones(N).long()),
    "no eigenvalues at all": ("eigenvalues", torch.ones(0).double()),
    "eigenvalues of NaN": ("eigenvalues", torch.full((N,), math.nan).double()),
    "outputs of three axes": ("outputs", torch.ones(N, 2, 2).double()),
    "outputs of flags": ("outputs", torch.ones(N, 2).bool()),
    "outputs of other probes": ("outputs", torch.ones(N + 3, 2).double()),
}
LIMITS: dict[str, dict[str, Any]] = {
    "a limit that is not square": {"limit": torch.ones(N, 3).double(), "limit_rows": torch.arange(N)},
    "a limit without its rows": {"limit": torch.eye(N).double()},
    "rows of a limit without it": {"limit_rows": torch.arange(N)},
    "rows of a limit far beyond the probes": {"limit": torch.eye(2).double(), "limit_rows": torch.tensor([2**60, 0])},
    "rows of a limit before the probes": {"limit": torch.eye(2).double(), "limit_rows": torch.tensor([-5, 0])},
    "rows of a limit that are flags": {"limit": torch.eye(N).double(), "limit_rows": torch.ones(N).bool()},
    "more rows than a limit has": {"limit": torch.eye(2).double(), "limit_rows": torch.arange(N)},
    "no rows of a limit": {"limit": torch.eye(2).double(), "limit_rows": torch.arange(0)},
    "a limit of zeros": {"limit": torch.zeros(N, N).double(), "limit_rows": torch.arange(N)},
    "a limit of NaN": {"limit": torch.full((N, N), math.nan).double(), "limit_rows": torch.arange(N)},
    "a covariance of another shape": {
        "limit": torch.eye(N).double(), "limit_rows": torch.arange(N), "limit_nngp": torch.eye(2).double(),
    },
}  # fmt: skip


def _dump(body: Any) -> bytes:
    """JSON that may hold what JSON does not: NaN, infinity."""
    return json.dumps(body, separators=(",", ":")).encode()


def seal(body: dict[str, Any]) -> bytes:
    text = _dump(body)
    return b'{"crc":"%08x",' % zlib.crc32(text) + text[1:] + b"\n"


def write_manifest(record: Path, body: dict[str, Any]) -> None:
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (record / "manifest.json").write_bytes(_dump(body | {"checksum": checksum}))


def read_manifest(record: Path) -> dict[str, Any]:
    body = json.loads((record / "manifest.json").read_bytes())
    del body["checksum"]
    return body


def put(body: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(body.get(name), dict):
            body[name] = {}
        body = body[name]
    body[path[-1]] = value


def forge_row(record: Path, rng: random.Random, path: tuple[str, ...], value: Any) -> None:
    lines = (record / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    body = decode_line(lines[at].rstrip(b"\n"))
    put(body, path, value)
    lines[at] = seal(body)
    (record / "metrics.jsonl").write_bytes(b"".join(lines))


def forge_manifest(record: Path, rng: random.Random, path: tuple[str, ...], value: Any) -> None:
    body = read_manifest(record)
    put(body, path, value)
    write_manifest(record, body)


def forge_snapshot(record: Path, data: bytes, at: int = -1) -> None:
    """A snapshot, the last if not told, and its line with the right checksum."""
    lines = (record / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    body = decode_line(lines[at].rstrip(b"\n"))
    (record / "snapshots" / f"{body['snapshot']['name']}.safetensors").write_bytes(data)
    body["snapshot"]["sha256"] = hashlib.sha256(data).hexdigest()
    lines[at] = seal(body)
    (record / "metrics.jsonl").write_bytes(b"".join(lines))


def forge_tensor(record: Path, at: int, forged: dict[str, Any]) -> None:
    path = sorted((record / "snapshots").iterdir())[at]
    tensors = {**safetensors.torch.load_file(path), **forged}
    forge_snapshot(record, safetensors.torch.save(tensors, metadata={"order": json.dumps(list(tensors))}), at)


def header(record: Path, text: bytes, length: int | None = None) -> None:
    forge_snapshot(record, (len(text) if length is None else length).to_bytes(8, "little") + text)


HEADERS: dict[str, Callable[[Path], None]] = {
    "a header of 2^63 bytes": lambda r: header(r, b"{}", 2**63),
    "a header longer than its file": lambda r: header(r, b"{}", 1000),
    "a header that is no JSON": lambda r: header(r, b"[" * 5000),
    "a header without order": lambda r: header(r, b"{}"),
    "an order that is no list": lambda r: header(r, b'{"__metadata__":{"order":"7"}}'),
    "an order that is no JSON": lambda r: header(r, b'{"__metadata__":{"order":"["}}'),
    "an order of tensors that are not there": lambda r: header(r, b'{"__metadata__":{"order":"[\\"a\\"]"}}'),
    "an order of deep lists": lambda r: header(r, b'{"__metadata__":{"order":"' + b"[" * 50_000 + b'"}}'),
    "a tensor of 2^62 numbers": lambda r: header(
        r, b'{"__metadata__":{"order":"[]"},"a":{"dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,8]}}'
    ),
    "tensors that lie over each other": lambda r: header(
        r, b'{"__metadata__":{"order":"[]"},"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}' + bytes(8)
    ),
    "an empty file": lambda r: forge_snapshot(r, b""),
    "a pickle": lambda r: forge_snapshot(r, b"\x80\x04N."),
}  # fmt: skip


def _replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def forge(path: Path) -> None:
        path.unlink()
        make(path)

    return forge


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


def _socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # a socket's path has a hundred characters at most
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(place)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": _replaced(os.mkfifo),
    "a folder": _replaced(lambda path: path.mkdir()),
    "a socket": _replaced(_socket),
    "a link to an endless device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to a terminal": _replaced(lambda path: path.symlink_to("/dev/tty")),
    "a link to a random device": _replaced(lambda path: path.symlink_to("/dev/urandom")),
    "a link to nothing": _replaced(lambda path: path.symlink_to("nothing")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path)),
    "a link to a pipe": _replaced(lambda path: _link_to_a_pipe(path)),
    "four tebibytes of nothing": _sparse,
    "nothing": lambda path: path.unlink(),
}  # fmt: skip
FILES = ("manifest.json", "metrics.jsonl", "snapshots/step_00000256.safetensors")
TEXTS: dict[str, Callable[[Path], None]] = {
    "a name twice in the manifest": lambda r: _twice(r / "manifest.json", b'"schema":1', b'"schema":1,"schema":1'),
    "a manifest of deep lists": lambda r: write_manifest(r, read_manifest(r) | {"hparams": {"a": DEEP}}),
    "a manifest of bytes that are no text": lambda r: _write(r / "manifest.json", b"\xff\xfe{}"),
    "a manifest that is a list": lambda r: _write(r / "manifest.json", b"[]"),
    "a manifest of 5000 digits": lambda r: _write(r / "manifest.json", b'{"schema":' + b"9" * 5000 + b"}"),
    "a name twice in a line": lambda r: _twice_in_a_line(r),
    "a thousand resumes": lambda r: _write(
        r / "metrics.jsonl", b"".join(seal({"line": i + 1, "resumed_at": i}) for i in range(1000))
    ),
    "one step many times": lambda r: _one_step(r),
    "steps that fall": lambda r: _falling(r),
    "an index of newlines": lambda r: _write(r / "metrics.jsonl", b"\n" * 1000),
    "an index of zeros": lambda r: _write(r / "metrics.jsonl", bytes(1000) + b"\n"),
}  # fmt: skip


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _twice(path: Path, old: bytes, new: bytes) -> None:
    write_manifest(path.parent, read_manifest(path.parent))
    path.write_bytes(path.read_bytes().replace(old, new))


def _twice_in_a_line(record: Path) -> None:
    line = (record / "metrics.jsonl").read_bytes().splitlines()[0]
    text = b"{" + line[line.index(b",") + 1 :].replace(b'"epoch":', b'"step":7,"epoch":', 1)
    (record / "metrics.jsonl").write_bytes(b'{"crc":"%08x",' % zlib.crc32(text) + text[1:] + b"\n")


def _rows(record: Path) -> list[dict[str, Any]]:
    return [decode_line(line) for line in (record / "metrics.jsonl").read_bytes().splitlines()]


def _one_step(record: Path) -> None:
    rows = [row | {"step": 3} for row in _rows(record)]
    (record / "metrics.jsonl").write_bytes(b"".join(map(seal, rows)))


def _falling(record: Path) -> None:
    rows = [row | {"step": 99 - i} for i, row in enumerate(_rows(record))]
    (record / "metrics.jsonl").write_bytes(b"".join(map(seal, rows)))


Forgery = Callable[[Path, random.Random], None]
FORGERIES: dict[str, Forgery] = {
    **{f"{file}: {kind}": lambda r, rng, f=file, m=make: m(r / f) for file in FILES for kind, make in KINDS.items()},
    **{name: lambda r, rng, n=n, t=t: forge_tensor(r, -1, {n: t}) for name, (n, t) in TENSORS.items()},
    **{f"{name}, first": lambda r, rng, n=n, t=t: forge_tensor(r, 0, {n: t}) for name, (n, t) in TENSORS.items()},
    **{name: lambda r, rng, t=t: forge_tensor(r, 0, t) for name, t in LIMITS.items()},
    **{name: lambda r, rng, m=make: m(r) for name, make in {**HEADERS, **TEXTS}.items()},
    **{f"line: {'.'.join(p)} is {name}": lambda r, rng, p=p, v=v: forge_row(r, rng, p, v)
       for p in ROW for name, v in VALUES.items()},
    **{f"manifest: {'.'.join(p)} is {name}": lambda r, rng, p=p, v=v: forge_manifest(r, rng, p, v)
       for p in MANIFEST for name, v in VALUES.items()},
}  # type: ignore[misc]  # fmt: skip


def sample(number: int, seed: int) -> list[str]:
    """So many names of forgeries: each kind of file and tensor, then lines and manifests at random."""
    fixed = [name for name in FORGERIES if not name.startswith(("line: ", "manifest: "))]
    others = [name for name in FORGERIES if name not in set(fixed)]
    rng = random.Random(seed)
    rng.shuffle(others)
    rng.shuffle(fixed)
    return [*fixed[: number // 2], *others[: number - min(number // 2, len(fixed))]]

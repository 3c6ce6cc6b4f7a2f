"""A record has one owner at a time: the process that writes it.

On one machine the owner holds a lock of the operating system, which ends with the process however that ends. For other
machines that share the folder, and where its file system has no locks, it also keeps a lease: a small file that says
who writes, renewed while the run goes on. A lease that was not renewed for `STALE_SECONDS` seconds is nobody's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import time
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ntkwatch.record.format import MANIFEST, RecordError, read_bytes, replace_file
from ntkwatch.record.schema import is_count, is_number

LOCK, LEASE = ".owner.lock", ".owner.json"
RENEWAL_SECONDS = 30.0  # seconds between two renewals of a lease
STALE_SECONDS = 300.0  # seconds: the owner may be busy with one long batch
MAX_LEASE_BYTES = 4096  # bytes
LOCK_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system that has none


class RecordInUse(RecordError):
    """The record belongs to a run that is going on."""


class Owner:
    """The right to write in one record's folder; made by `acquire` and `acquire_free`, given back by `release`."""

    def __init__(self, folder: Path, lock: FileLock | None) -> None:
        self.folder = folder
        self._lock = lock
        self._token = secrets.token_hex(8)
        self._renewed = time.monotonic()
        self._write_lease()

    def renew(self) -> None:
        """Say that the run goes on, at most every 30 s; call it as often as you like. A disk that fails is no news."""
        if time.monotonic() - self._renewed < RENEWAL_SECONDS:
            return
        self._renewed = time.monotonic()
        with contextlib.suppress(OSError):
            if self.holds():
                self._write_lease()

    def holds(self) -> bool:
        """Whether nobody has taken the record over, as another machine may after `STALE_SECONDS` seconds of silence."""
        lease = _lease(self.folder)
        return lease is None or lease["token"] == self._token

    def release(self) -> None:
        """Let the next run have the record at once."""
        if (lease := _lease(self.folder)) is not None and lease["token"] == self._token:
            with contextlib.suppress(OSError):
                (self.folder / LEASE).unlink(missing_ok=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()

    def _write_lease(self) -> None:
        lease = {"machine": _machine(), "pid": os.getpid(), "token": self._token, "renewed": time.time()}
        replace_file(self.folder / LEASE, json.dumps(lease).encode())


def acquire(folder: Path) -> Owner:
    """Acquire the record in `folder`; RecordInUse where a process that lives, or a lease that is fresh, has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    lease = _lease(folder)
    if lease is not None and _is_fresh(lease, locked=lock is not None):
        if lock is not None:
            lock.release()
        raise RecordInUse(
            f"{folder} is being written by a run on another machine (or was, up to {STALE_SECONDS:.0f} s ago)."
        )
    return Owner(folder, lock)


def acquire_free(folder: Path) -> Owner:
    """Own the first of `folder`, `folder-2`, … that holds no record and that no other run is about to write."""
    for k in count(1):
        free = folder if k == 1 else folder.with_name(f"{folder.name}-{k}")
        if _is_taken(free):
            continue
        try:
            owner = acquire(free)
        except RecordInUse:
            continue
        if not _is_taken(free):  # another run may have come and gone since we looked
            return owner
        owner.release()
    raise AssertionError("there are infinitely many names")


def _is_taken(folder: Path) -> bool:
    return os.path.lexists(folder / MANIFEST)


def _locked(folder: Path) -> FileLock | None:
    """The operating system's lock on the folder, None where its file system has none; RecordInUse where it is held."""
    # Without the fallback to a file that merely exists: of a process that died, that would stay for ever.
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RecordInUse(f"{folder} is being written by another run.") from None
    except OSError as error:
        if error.errno in LOCK_UNSUPPORTED:
            return None
        raise
    return lock


def _lease(folder: Path) -> dict[str, Any] | None:
    """What the lease says; None where there is none, or none that makes sense."""
    try:
        lease = json.loads(read_bytes(folder / LEASE, MAX_LEASE_BYTES))
    except (RecordError, ValueError, RecursionError):
        return None
    sensible = (
        isinstance(lease, dict)
        and isinstance(lease.get("machine"), str)
        and isinstance(lease.get("token"), str)
        and is_count(lease.get("pid"))
        and is_number(lease.get("renewed"))
    )
    return lease if sensible else None


def _is_fresh(lease: dict[str, Any], locked: bool) -> bool:
    """Whether the owner may still be alive.

    Clocks of machines that share a disk are assumed to differ by less than `STALE_SECONDS`.
    """
    if locked and lease["machine"] == _machine():
        return False  # it would hold the lock
    return abs(time.time() - lease["renewed"]) <= STALE_SECONDS


def _machine() -> str:
    """One running kernel: within it the lock can be trusted. Containers of one image have one name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()

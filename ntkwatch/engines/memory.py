"""Memory: free bytes, the peak of a run, and smaller blocks when memory runs out.

A measurement runs inside somebody's training, so it uses only a share of the free memory.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
SHARE = 0.25  # of the free memory: the training run keeps the rest
MIB = 1 << 20
_LEAST = 32 * MIB
_WORDS = ("can't allocate memory", "not enough memory", "could not create a primitive", "could not create a memory")
_UNKNOWN = 2 << 30  # assumed free if the system does not report it


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of live storages that operations inside the context have created."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0.0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and the default would load torch's compiler, most of a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result, args, kwargs)
        return result

    def count(self, result: Any, args: Any, kwargs: Any) -> None:
        """Adds the storages that a call created: those of its result that are not among its arguments."""
        new = [s for t in _tensors(result) for s in storages(t) if s._cdata not in self._known]
        if new:
            given = {storage._cdata for t in _tensors((*args, *(kwargs or {}).values())) for storage in storages(t)}
            for storage in new:
                if storage._cdata not in given:
                    self._watch(storage)

    def weight(self, size: int) -> float:
        """The bytes that a storage of `size` bytes counts for; subclasses override it."""
        return size

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, self.weight(storage.nbytes())
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: float) -> None:
        del self._known[key]
        self.now -= size


def storages(t: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a tensor: one, or those of a sparse tensor's parts; none for layouts without access."""
    if t.layout is torch.strided:
        return [t.untyped_storage()]
    if t.layout is torch.sparse_coo:
        parts = [t._indices(), t._values()]
    elif t.layout in _COMPRESSED:
        rows = t.layout in (torch.sparse_csr, torch.sparse_bsr)
        parts = [t.crow_indices(), t.col_indices()] if rows else [t.ccol_indices(), t.row_indices()]
        parts.append(t.values())
    else:
        parts = []
    return [part.untyped_storage() for part in parts]


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, also in lists."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at once in tensors that `run` creates."""
    with LiveStorages() as counter:
        run()
        return int(counter.peak)


def free_bytes(device: torch.device) -> int:
    """Free memory on the device [bytes], as the system reports it."""
    if device.type == "cuda":
        return _free_on_gpu(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return min(available, _address_space())
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_AVPHYS_PAGES"))
    return _UNKNOWN


def _free_on_gpu(device: torch.device) -> int:
    """Free bytes in the driver and in torch's cache, within the share that this process may use."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, taken = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return max(0, min(free + reserved, int(share * total)) - taken)


def _address_space() -> int:
    """Bytes left under a limit of the address space (ulimit -v), if there is one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm") as line:
                return max(0, limit - int(line.read().split()[0]) * resource.getpagesize())
    return 1 << 62


def limit_bytes(device: torch.device) -> int:
    """The memory that a kernel may use by default [bytes]."""
    return int(SHARE * free_bytes(device))


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def check_free(device: torch.device) -> None:
    """Checks that enough memory is free for a kernel and the interpreter.

    Raises:
        MemoryError: less than 32 MiB are free.
    """
    free = free_bytes(device)
    if free < _LEAST:
        raise MemoryError(
            f"{free / MIB:.0f} MiB of memory are free on {device}, and a kernel needs at least {_LEAST / MIB:.0f}: "
            "raise the memory limit, or free some"
        )


class OutOfMemory(MemoryError):
    """Memory ran out; the message says where, and gives remedies that every caller has."""


def ran_out(what: str, device: torch.device, error: str) -> OutOfMemory:
    """The error for memory that ran out, with the remedy."""
    return OutOfMemory(
        f"memory ran out {what} ({free_bytes(device) / MIB:.0f} MiB are free on {device} now; {error}): raise the "
        "memory limit, or use a smaller reduction=, or fewer outputs with outputs="
    )


def backing_off(
    attempt: Callable[[int], T], chunk: int, device: torch.device, learned: Callable[[int], object] = lambda size: None
) -> T:
    """`attempt(chunk)`, with `chunk` halved each time memory runs out; `learned` receives every new size.

    Raises:
        OutOfMemory: a single probe needs too much memory.
    """
    while True:
        try:
            return attempt(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        if chunk == 1:  # outside the handler, where no frame holds the memory
            raise ran_out("with one probe at a time", device, reason)
        chunk = -(-chunk // 2)
        learned(chunk)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; on the CPU it is a plain RuntimeError with the words of oneDNN or torch."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)

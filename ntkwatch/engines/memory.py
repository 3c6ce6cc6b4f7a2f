"""Memory: what is free, what a run takes at its peak, and halving the blocks where it runs out."""

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
SHARE = 0.25  # of what is free: a guest in somebody's training run takes no more
MIB = 1 << 20
_LEAST = 32 * MIB
_WORDS = ("can't allocate memory", "not enough memory", "could not create a primitive", "could not create a memory")
_UNKNOWN = 2 << 30  # taken as free where the system does not say


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0.0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled in here, and to say so anyway loads torch's whole compiler, most of a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(result, args, kwargs)
        return result

    def count(self, result: Any, args: Any, kwargs: Any) -> None:
        """Adds the storages that a call has made: those of its result that are not among its arguments'."""
        new = [s for t in _tensors(result) for s in storages(t) if s._cdata not in self._known]
        if new:
            given = {storage._cdata for t in _tensors((*args, *(kwargs or {}).values())) for storage in storages(t)}
            for storage in new:
                if storage._cdata not in given:
                    self._watch(storage)

    def weight(self, size: int) -> float:
        """How many bytes a storage of `size` bytes counts for."""
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
    """Of a tensor: one, or those of what a sparse one consists of; none that torch does not give."""
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
    """Those that an operation takes or gives, in lists too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at once in tensors that `run` makes."""
    with LiveStorages() as counter:
        run()
        return int(counter.peak)


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken on the device, as the system says."""
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
    """What the driver and torch's own cache hold ready, within the share that this process may take."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, taken = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return max(0, min(free + reserved, int(share * total)) - taken)


def _address_space() -> int:
    """What a limit on the address space leaves (ulimit -v), where there is one."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm") as line:
                return max(0, limit - int(line.read().split()[0]) * resource.getpagesize())
    return 1 << 62


def limit_bytes(device: torch.device) -> int:
    """What a kernel may take by default."""
    return int(SHARE * free_bytes(device))


def first_line(error: BaseException) -> str:
    """Its kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def check_free(device: torch.device) -> None:
    """Raises MemoryError where so little is free that the interpreter itself may fail."""
    free = free_bytes(device)
    if free < _LEAST:
        raise MemoryError(
            f"{free / MIB:.0f} MiB of memory are free on {device}, and a kernel needs {_LEAST / MIB:.0f} at the least: "
            "raise the memory limit, or free some"
        )


class OutOfMemory(MemoryError):
    """Memory ran out, where, and what to do that every caller can do."""


def ran_out(what: str, device: torch.device, error: str) -> OutOfMemory:
    """The error that says that memory ran out, and what to do."""
    return OutOfMemory(
        f"memory ran out {what} ({free_bytes(device) / MIB:.0f} MiB are free on {device} now; {error}): raise the "
        "memory limit, or take a smaller reduction= or, through outputs=, fewer outputs"
    )


def backing_off(
    attempt: Callable[[int], T], chunk: int, device: torch.device, learned: Callable[[int], object] = lambda size: None
) -> T:
    """`attempt(chunk)`, with blocks halved as often as memory runs out; `learned` is told every new size.

    Raises MemoryError where one probe at a time is too much.
    """
    while True:
        try:
            return attempt(chunk)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        if chunk == 1:  # outside of the handler: the frames that hold the memory are gone
            raise ran_out("with one probe at a time", device, reason)
        chunk = -(-chunk // 2)
        learned(chunk)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is out-of-memory; on the CPU that is a plain RuntimeError, in oneDNN's words or torch's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)

"""Memory: what is free, and what a run takes at its peak, counted on real or on fake tensors."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ntkwatch.engines.shapes import quickly
from ntkwatch.engines.values import Answers, Described, Lists

T = TypeVar("T")
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
SHARE = 0.25  # of what is free: a guest in somebody's training run takes no more
MIB = 1 << 20
_LEAST = 32 * MIB
_WORDS = ("can't allocate memory", "not enough memory", "could not create a primitive", "could not create a memory")
_UNKNOWN = 2 << 30  # taken as free where the system does not say


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside have made and that are still alive.

    Args:
        answers: what to answer where operations ask for values and tensors have none.
    """

    def __init__(self, answers: Answers | None = None) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._known: set[int] = set()
        self.answers = answers

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled in here, and to say so anyway loads torch's whole compiler, most of a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = quickly(func, args, kwargs)
        if known is not None:  # of a storage that is counted already, or was there before
            return known
        answer = None if self.answers is None else self.answers.give(func, args, kwargs)
        result = func(*args, **(kwargs or {})) if answer is None else answer()
        new = [s for t in _tensors(result) for s in storages(t) if s._cdata not in self._known]
        if new:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            given = {storage._cdata for t in tensors for storage in storages(t)}
            for storage in new:
                if storage._cdata not in given:
                    self._watch(storage)
        return result

    def rise(self, run: Callable[[], T]) -> tuple[T, int]:
        """What `run` gives, and by how much it raises what is alive, at its worst."""
        before, start = self.peak, self.now
        self.peak = start
        result = run()
        rise = self.peak - start
        self.peak = max(before, self.peak)
        return result, rise

    def reserve(self, size: int) -> None:
        """Counts `size` more bytes as having been alive for a moment."""
        self.peak = max(self.peak, self.now + size)

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.made += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass
class Repeats:
    """What is done once, and then only remembered: how much memory it took in passing, and what it gave."""

    counter: LiveStorages
    seen: dict[Any, tuple[int, Any]] = field(default_factory=dict)

    def once(self, key: Any, run: Callable[[], Any]) -> Any:
        """What `run` gives; where something of this key was run before, tensors of the same shapes."""
        if key not in self.seen:
            result, rise = self.counter.rise(run)
            self.seen[key] = rise, tree_map_only(Tensor, Described, result)
            return result
        rise, made = self.seen[key]
        self.counter.reserve(rise)
        return tree_map_only(Described, Described.made, made)


class Forward(LiveStorages):
    """Notes what a forward pass multiplies, makes and keeps, and what it asks of values."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.calls = 0
        self.kept = 0  # bytes alive at its end
        self.noted = Answers()
        self._lists = Lists(self.noted)

    def __enter__(self) -> Forward:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls += 1
        self.noted.note(func, args, kwargs, result)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def storages(t: Tensor) -> list[torch.UntypedStorage]:
    """Of a tensor: one, or those of what a sparse one consists of; none that torch does not give."""
    if t.layout is torch.sparse_coo:
        parts = [t._indices(), t._values()]
    elif t.layout in _COMPRESSED:
        rows = t.layout in (torch.sparse_csr, torch.sparse_bsr)
        parts = [t.crow_indices(), t.col_indices()] if rows else [t.ccol_indices(), t.row_indices()]
        parts.append(t.values())
    else:
        parts = [t] if t.layout is torch.strided else []
    return [part.untyped_storage() for part in parts]


def _tensors(result: Any) -> Iterator[Tensor]:
    """Those that an operation gives."""
    return (t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at once in tensors that `run` makes."""
    with LiveStorages() as counter:
        run()
        return counter.peak


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

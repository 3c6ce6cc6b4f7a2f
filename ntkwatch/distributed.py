"""The only collectives; the identity when alone."""

from __future__ import annotations

import contextlib
import math
import pickle
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = 300.0  # seconds that ranks wait for one that measures, or that does not come
DEFAULT_WAIT = 0.8  # of the timeout: a probe of rank 0's ends there, in time for the others to learn of it
FORESEEN = 0.5  # of the timeout: a probe that may take longer is not begun
T = TypeVar("T")


class TooLong(RuntimeError):
    """A probe takes longer than the other ranks can wait for it."""


class RanksError(RuntimeError):
    """A rank did not answer in time, or what rank 0 had to say cannot be sent; training's own groups are untouched."""


@dataclass(frozen=True)
class Joined:
    """What all ranks had: the mean of their gradients by name, who failed, and the sum of their counts."""

    gradients: dict[str, Tensor | None]
    failed: tuple[int, ...]
    count: int


class Ranks:
    """The processes of a run, with a gloo group of their own, made at the first collective.

    Every rank calls the same methods in the same order. After a collective has failed the group is given up: every
    later call raises at once, so that nobody waits for ranks that have gone on.
    """

    def __init__(self, rank: int, size: int, timeout: float = TIMEOUT) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout

    @classmethod
    def detect(cls, timeout: float | None = None) -> Ranks:
        """The ranks of torch.distributed's default group; one alone where there is none. It does not communicate.

        timeout: in seconds; None: TIMEOUT, but at most half of the default group's. A rank that does not come to ours
        waits in one of training's, which must not run out before the others have given up on it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1, timeout or TIMEOUT)
        return cls(dist.get_rank(), dist.get_world_size(), timeout or min(TIMEOUT, _training_timeout() / 2))

    @property
    def patience(self) -> float:
        """Seconds that rank 0 may measure while the others wait for it; without end where there are none."""
        return math.inf if self.size == 1 else DEFAULT_WAIT * self.timeout

    def foresee(self, seconds: float, probes: int) -> None:
        """Raises TooLong where a probe of so many examples, which may take so many seconds, is too long to wait for."""
        most = math.inf if self.size == 1 else FORESEEN * self.timeout
        if seconds > most:
            raise TooLong(
                f"a probe of {probes} examples may take some {seconds:.0f} s, more than the {most:.0f} s that rank 0 "
                f"has while the others wait; {max(1, int(probes * most / seconds))} would do"
            )

    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def agree(self, ok: bool) -> bool:
        """Whether every rank says ok; the same answer on all."""
        return not self.failed(ok)

    def failed(self, ok: bool) -> tuple[int, ...]:
        """The ranks that do not say ok, in order; the same answer on all. Raises RanksError if one does not come."""
        votes = torch.ones(self.size, dtype=torch.int32, device="cpu")
        votes[self.rank] = int(bool(ok))
        if self.size > 1:
            self._together("agree", lambda group: dist.all_reduce(votes, dist.ReduceOp.MIN, group=group))
        return tuple(int(rank) for rank in (votes == 0).nonzero())

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank: primitives, lists, tuples, dicts and tensors (these arrive on the CPU).

        Raises RanksError on every rank if it cannot be sent, or if a rank does not come in time.
        """
        if self.size == 1:
            return value
        box: list[Any] = [_packed(value) if self.first() else None]
        self._together("broadcast", lambda group: dist.broadcast_object_list(box, 0, group, device=torch.device("cpu")))
        said, payload = box[0]
        if said is not None:
            raise RanksError(f"rank 0 cannot send its {said}; send primitives, dicts and tensors")
        return value if self.first() else pickle.loads(payload)  # from rank 0 of this very run

    def join(
        self, gradients: Mapping[str, Tensor | None], like: Mapping[str, Tensor], *, ok: bool, count: int
    ) -> Joined:
        """One all-reduce: the mean of gradients over all ranks, as DDP takes it, and what each had to say beside.

        A gradient that no rank has stays None; one that some have counts as zero on the others. What a rank that is not
        ok brings is left out, but it must come: raises RanksError on every rank if one does not come in time.

        Args:
            like: a tensor of each gradient's shape and type, by name; the same on every rank.
            ok, count: this rank's own.
        """
        if self.size == 1:
            return Joined(dict(gradients), () if ok else (0,), count)
        given = {name: gradients.get(name) if ok else None for name in like}
        wide = any(tensor.dtype == torch.float64 for tensor in like.values())
        said = [float(g is not None) for g in given.values()] + [float(count)]
        said += [float(ok or rank != self.rank) for rank in range(self.size)]
        parts = [
            torch.zeros(p.numel(), device="cpu") if (g := given[name]) is None else _flat(g) for name, p in like.items()
        ]
        dtype = torch.float64 if wide else torch.float32
        whole = torch.cat([part.to("cpu", dtype) for part in [*parts, torch.tensor(said, device="cpu")]])
        self._together("add up gradients", lambda group: dist.all_reduce(whole, group=group))
        *sums, said_together = whole.split([*(p.numel() for p in like.values()), len(said)])
        has, (total, *votes) = said_together[: len(like)], said_together[len(like) :].tolist()
        means = {
            name: (s / self.size).reshape(p.shape).to(p) if h else None
            for (name, p), s, h in zip(like.items(), sums, has.tolist(), strict=True)
        }
        return Joined(means, tuple(r for r, vote in enumerate(votes) if round(vote) < self.size), round(total))

    def _together(self, what: str, collective: Callable[[Any], Any]) -> None:
        own = _own_group(self.timeout)
        if own.broken is not None:
            raise RanksError(f"rank {self.rank} does not {what}: an earlier collective failed ({own.broken})")
        try:
            if own.group is None:
                self._arrive()
                own.group = weakref.ref(dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout)))
            collective(own.group())
        except Exception as error:
            own.broken = f"{type(error).__name__}: {error}".splitlines()[0]
            raise RanksError(
                f"rank {self.rank} waited to {what} with {self.size} ranks and one did not come within "
                f"{self.timeout:g} s ({own.broken}); training goes on, look at the log of the other ranks"
            ) from error

    def _arrive(self) -> None:
        """Waits for all ranks before a group is made: torch counts its groups, and a rank that made one more than the
        others would never again make one with them."""
        store = dist.distributed_c10d._get_default_store()
        keys = [f"ntkwatch/{self.timeout!r}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], "here")
        try:
            store.wait(keys, timedelta(seconds=self.timeout))
        except Exception:
            store.delete_key(keys[self.rank])
            raise


@dataclass
class _Own:
    """Our group of one default group. By weak reference: torch owns both, and a store kept alive blocks its port."""

    world: weakref.ref[Any]
    group: weakref.ref[Any] | None = None
    broken: str | None = None


_groups: dict[float, _Own] = {}  # by timeout; a second Ranks of the same run shares the group and its fate


def _training_timeout() -> float:
    """Seconds after which the default group gives up: the least of its backends', TIMEOUT · 2 where none says."""
    group, found = dist.distributed_c10d._get_default_group(), [2 * TIMEOUT]
    for device in group._device_types:
        with contextlib.suppress(AttributeError, RuntimeError):
            found.append(group._get_backend(device).options._timeout.total_seconds())
    return min(found)


def _own_group(timeout: float) -> _Own:
    own = _groups.get(timeout)
    if own is None or own.world() is not dist.group.WORLD:
        own = _groups[timeout] = _Own(weakref.ref(dist.group.WORLD))
    return own


def _flat(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.layout != torch.strided else gradient).detach().reshape(-1)


def _packed(value: Any) -> tuple[str | None, bytes]:
    """(None, bytes), or (what cannot be packed, nothing): found out before anyone waits."""
    try:
        return None, pickle.dumps(_on_cpu(value))
    except Exception as error:
        return f"{type(value).__name__} ({type(error).__name__}: {error})", b""


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_on_cpu(item) for item in value)
    return value


def sharded(module: nn.Module) -> str | None:
    """Why the parameters of `module` live on several ranks (one clause, naming one), or None if they do not."""
    for name, child in module.named_modules():
        if (kind := spread(type(child))) is not None:
            return f"{name or type(module).__name__} is managed by {kind}"
    for name, parameter in module.named_parameters():
        if spread(type(parameter)) is not None:
            return f"{name} is a DTensor"
    return None


def spread(kind: type) -> str | None:
    """What spreads the parameters of a class of modules, or the values of a class of tensors, over ranks; or None.

    Told by name, since where these classes live has moved from one torch to the next.
    """
    bases = [base.__name__ for base in kind.__mro__]
    return next((name for name in ("FSDPModule", "FullyShardedDataParallel", "DTensor") if name in bases), None)

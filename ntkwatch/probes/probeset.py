"""ProbeSet: a frozen batch and its hash; what a user's `probes=` asks for."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkwatch.model import Network, batch_size, inputs_of, map_leaves
from ntkwatch.model.batch import custom_batch_advice
from ntkwatch.model.batch_reading import likely_targets
from ntkwatch.model.errors import batch_source, check_form

Targets = Tensor | Callable[[Any], Any] | None


@dataclass(frozen=True)
class ProbeSet:
    """n inputs, and targets where there are any.

    batch: as the loader would give it, collated, n rows. targets: as they are there, [n] ints (classes), [n] or [n, k]
    floats, or None. source: "val", "train" or "given". how: one sentence on how they were chosen. indices: into the
    dataset. hash, targets_hash: sha256 of the inputs and of the targets as they were first given, before any cast.
    own: the targets were read from the batch, by the form alone; `for_network` reads them as a model takes the batch.
    """

    batch: Any
    targets: Tensor | None
    source: str
    how: str
    indices: tuple[int, ...] | None
    hash: str
    targets_hash: str | None
    own: bool = False
    n: int | None = None  # where a model has shown it

    def __len__(self) -> int:
        return batch_size(self.inputs) if self.n is None else self.n

    @property
    def inputs(self) -> Any:
        """The batch without its targets."""
        return inputs_of(self.batch)

    @classmethod
    def of(cls, probes: Any, targets: Targets = None) -> ProbeSet:
        """A ProbeSet as it is, or with other targets; anything else is a batch."""
        if isinstance(probes, ProbeSet):
            return probes if targets is None else cls.from_batch(probes.batch, targets)
        return cls.from_batch(probes, targets)

    @classmethod
    def from_batch(
        cls,
        batch: Any,
        targets: Targets = None,
        source: str = "given",
        how: str = "given by the user",
        indices: Sequence[int] | None = None,
    ) -> ProbeSet:
        """A copy of `batch`; targets: None takes the batch's own, a callable is asked for those of the batch.

        Raises:
            ValueError: a loader, a dataset, no dense tensor with a row per example among the inputs, no rows, or
                targets of another length.
        """
        batch = map_leaves(frozen_copy, batch)
        check_form(batch)
        n = batch_size(inputs_of(batch))
        if n == 0:
            raise ValueError("probes= holds no rows; pass at least two examples")
        raw = _as_targets(targets(batch) if callable(targets) else targets, "targets=")
        own = raw is None
        raw = likely_targets(batch) if raw is None else raw
        if raw is not None and (raw.ndim == 0 or len(raw) != n):
            if targets is not None:
                raise ValueError(f"targets= gives {list(raw.shape)} for {n} probes; it must have a row for each")
            raw = None  # the last item of the batch is no target: a length, a mask, a flag
        return cls(
            batch, None if raw is None else raw.detach().clone(), source, how,
            None if indices is None else tuple(int(i) for i in indices),
            content_hash(inputs_of(batch)), None if raw is None else content_hash(raw), own,
        )  # fmt: skip

    def for_network(self, network: Network) -> ProbeSet:
        """The same inputs, with the targets that a network's forward leaves; those that were given stay.

        A few of the probes may be run through the network.
        """
        n = network.batch(self.batch).n
        if not self.own:
            return replace(self, n=n)
        raw = network.targets(self.batch)
        raw = None if raw is None or raw.ndim == 0 or len(raw) != n else raw
        if _equal(raw, self.targets):  # perhaps in the type that training casts them to
            return replace(self, n=n)
        digest = None if raw is None else content_hash(raw)
        return replace(self, n=n, targets=None if raw is None else raw.detach().clone(), targets_hash=digest)


def frozen_copy(leaf: Any) -> Any:
    """A copy of one's own: the loader or the user may write into theirs."""
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            return torch.from_numpy(leaf.copy())
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool((a.cpu() == b.cpu()).all())


def _as_targets(raw: Any, name: str) -> Tensor | None:
    if raw is None or isinstance(raw, Tensor):
        return raw
    try:
        return torch.as_tensor(raw, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} gives {type(raw).__name__}, not a tensor [n] or [n, C]: {error}") from error


# ── the hash ─────────────────────────────────────────────────────────────────────────────────────────────────────


def content_hash(value: Any) -> str:
    """sha256 over type, shape and bytes of the leaves; mappings in the order of their sorted keys.

    The same on every machine and in every process; on the CPU and on a GPU.
    """
    digest = hashlib.sha256()
    for leaf in _leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}\n".encode())
            digest.update(_bytes(leaf))
        else:
            text = repr(leaf).encode()
            digest.update(f"{type(leaf).__name__} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        yield torch.from_numpy(np.array(value))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, Tensor | str | bytes | int | float | complex | None):
        yield value
    else:  # a default repr holds an address
        yield type(value).__name__
        yield from _leaves(dict(getattr(value, "__dict__", {})))


def _bytes(tensor: Tensor) -> bytes:
    with torch.inference_mode(False), torch.no_grad():
        flat = tensor.detach().cpu()
        if flat.is_quantized:
            flat = flat.dequantize()
        elif flat.layout != torch.strided:
            flat = flat.to_dense()
        flat = flat.resolve_conj().resolve_neg().reshape(-1).contiguous()
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


# ── the argument `probes=` ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProbeRequest:
    """What `probes=` asks for: n from a split ("val", "train", None: val where there is one), or the data itself."""

    n: int = 64
    split: str | None = None
    data: Any = None


def parse_probes(probes: Any) -> ProbeRequest:
    """A ProbeRequest from the argument `probes=`: a split, a count or data.

    Raises:
        ValueError: what is none of "train", "val", a count of at least 2, a tensor, a batch, a ProbeSet.
    """
    if isinstance(probes, str) and probes in ("train", "val"):
        return ProbeRequest(split=probes)
    if isinstance(probes, int | np.integer) and not isinstance(probes, bool) and probes >= 2:
        return ProbeRequest(n=int(probes))
    if isinstance(probes, Tensor | np.ndarray | Mapping | tuple | list | ProbeSet) or dataclasses.is_dataclass(probes):
        as_probe_set(probes)
        return ProbeRequest(data=probes)
    if (giver := batch_source(probes)) is not None:
        kind, how = giver
        raise ValueError(
            f"probes= takes no {kind}, got {type(probes).__name__}; pass a batch of it, {how}, or 'train' or 'val'"
        )
    if (said := custom_batch_advice(probes)) is not None:
        raise ValueError(f"probes=: {said}")
    raise ValueError(
        f"probes={probes!r} is not understood; use 'train', 'val', how many examples (2 or more), "
        "a tensor [n, …], a batch or a ProbeSet"
    )


def as_probe_set(data: Any, targets: Targets = None) -> ProbeSet:
    """The ProbeSet of data that the user passed; raises ValueError as `from_batch`, naming `probes=`."""
    if isinstance(data, ProbeSet):
        if targets is None:
            return data
        return ProbeSet.from_batch(data.batch, targets, data.source, data.how, data.indices)
    if isinstance(data, tuple | list) and not data:
        raise ValueError("probes= is empty; pass a tensor [n, …] or a batch")
    try:
        return ProbeSet.from_batch(data, targets)
    except ValueError as error:
        raise error if "=" in str(error) else ValueError(f"probes=: {error}") from error

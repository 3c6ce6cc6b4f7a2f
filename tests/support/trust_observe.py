"""What the trust harness sees of a run: everything that a monitor could change, as digests that compare bitwise.

`Opening` and `Closing` are callbacks placed just before and just after the watcher. At every hook `Closing` notes RNG,
batch, loss, flags, gradients and weights, which two runs compare; the pair also compares the instant before the watcher
with the one after it, by object where a digest cannot see (`.grad` replaced by an equal tensor, a dead cached tensor).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from tests.support.device import DEVICE

HOOK_TABLES = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]
GLOBAL_TABLES = [
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
]


def digest(*values: Any) -> str:
    """Hex digest of tensors (dtype, shape, bytes), arrays, containers and primitives, bit for bit."""
    sha = hashlib.sha256()
    for value in values:
        _feed(sha, value)
    return sha.hexdigest()[:16]


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(f"T{value.dtype}{tuple(value.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        sha.update(f"A{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            sha.update(f"K{key!r}".encode())
            _feed(sha, value[key])
    elif isinstance(value, list | tuple):
        sha.update(f"L{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def rng() -> dict[str, str]:
    return {
        "rng/python": digest(repr(random.getstate())),
        "rng/numpy": digest(np.random.get_state()),  # noqa: NPY002
        "rng/torch": digest(torch.get_rng_state()),
        "rng/cuda": digest(torch.cuda.get_rng_state_all() if DEVICE.type == "cuda" else []),
    }


def process() -> dict[str, str]:
    """Switches of the whole process that a probe could leave turned."""
    cuda = torch.backends.cuda
    switches = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast cpu": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": (cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "sdp": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "mha fast path": torch.backends.mha.get_fastpath_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "default device": torch.get_default_device(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "global hooks": [len(getattr(global_hooks, table)) for table in GLOBAL_TABLES],
    }
    return {f"process/{name}": str(value) for name, value in switches.items()}


def hook_counts(module: nn.Module) -> dict[str, int]:
    """Hooks per module and table, and those on parameters; only tables that hold some."""
    counts = {}
    for name, sub in module.named_modules():
        for table in HOOK_TABLES:
            counts[f"hooks/{name}.{table}"] = len(getattr(sub, table, None) or ())
    for name, p in module.named_parameters():
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            counts[f"hooks/{name}.{table}"] = len(getattr(p, table, None) or ())
    return {name: count for name, count in counts.items() if count}


def state(module: nn.Module) -> dict[str, str]:
    """Weights, buffers, gradients, flags, hooks and instance attributes' names, one digest each."""
    seen = {f"weights/{name}": digest(value) for name, value in module.state_dict().items()}
    seen |= {f"buffers/{name}": digest(value) for name, value in module.named_buffers()}
    for name, p in module.named_parameters():
        seen[f"requires_grad/{name}"] = str(p.requires_grad)
        seen[f"grad/{name}"] = "None" if p.grad is None else digest(p.grad)
    for name, sub in module.named_modules():
        seen[f"training/{name}"] = str(sub.training)
        seen[f"attributes/{name}"] = ",".join(sorted(map(str, sub.__dict__)))
    return seen | {name: str(count) for name, count in hook_counts(module).items()}


@dataclass
class Instant:
    """One moment of a module and the process, with the objects themselves, to be compared with a later moment."""

    digests: dict[str, str]
    objects: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Instant:
        objects: dict[str, Any] = {}
        for name, p in module.named_parameters():
            objects |= {f"object/{name}": p, f"object/{name}.grad": p.grad, f"version/{name}": p._version}
        for name, sub in module.named_modules():
            kept = {k: v for k, v in sub.__dict__.items() if isinstance(v, Tensor) or v is None}
            objects |= {f"object/{name}.{k}": v for k, v in kept.items()}
        return cls({**state(module), **rng(), **process()}, objects)

    def changed(self, later: Instant) -> list[str]:
        names = first_differences(self.digests, later.digests)
        for name in sorted(self.objects.keys() | later.objects.keys()):
            old, new = self.objects.get(name), later.objects.get(name)
            same = old == new if name.startswith("version/") else old is new
            names += [] if same else [name]
        return names


def first_differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


@dataclass
class Observation:
    """One run: a digest a moment, the final state, what the watcher changed on the spot, and how it ended."""

    moments: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    final: dict[str, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # not compared: a watcher may speak
    losses: int = 0
    error: str | None = None

    def difference(self, other: Observation) -> str | None:
        """The first thing in which two runs differ, in words; None where they are the same bit for bit."""
        if self.error != other.error:
            return f"ended with {other.error or 'no error'} instead of {self.error or 'no error'}"
        for i, ((hook, mine), (their_hook, theirs)) in enumerate(zip(self.moments, other.moments, strict=False)):
            if hook != their_hook:
                return f"moment {i} is {their_hook} instead of {hook}"
            names = first_differences(mine, theirs)
            if names:
                return f"{names[0]} at {hook} (moment {i})"
        if len(self.moments) != len(other.moments):
            return f"{len(other.moments)} moments instead of {len(self.moments)}"
        names = first_differences(self.final, other.final)
        return f"{names[0]} at the end" if names else None

    def reached_the_weights(self, other: Observation) -> bool:
        """Whether the other run ended with other weights or did not end at all."""
        names = first_differences(self.final, other.final)
        return other.error is not None or any(name.startswith("weights/") for name in names)


MOMENTS = [
    "setup",
    "on_fit_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_after_backward",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_save_checkpoint",
    "on_fit_end",
]


class Opening(pytorch_lightning.Callback):
    """Stands before the watcher: takes the instant that `Closing` compares with."""

    def __init__(self) -> None:
        self.instant: Instant | None = None
        for hook in MOMENTS:
            setattr(self, hook, self._take)

    def _take(self, trainer: Any, module: Any, *args: Any, **named: Any) -> None:
        self.instant = Instant.of(module)


class Closing(pytorch_lightning.Callback):
    """Stands after the watcher: notes what it changed on the spot, and the moment for the comparison of two runs."""

    def __init__(self, opening: Opening, seen: Observation) -> None:
        self.opening, self.seen = opening, seen
        for hook in MOMENTS:
            setattr(self, hook, partial(self._note, hook))  # picklable: ddp_spawn sends it

    def _note(self, hook: str, trainer: Any, module: Any, *args: Any, **named: Any) -> None:
        now = Instant.of(module)
        if self.opening.instant is not None:
            self.seen.violations += [f"{name} at {hook}" for name in self.opening.instant.changed(now)]
        moment = {**now.digests}
        if hook.endswith(("batch_start", "batch_end")):
            moment["batch and outputs"] = digest(*args)
            self.seen.losses += hook == "on_train_batch_end"
        self.seen.moments.append((hook, moment))

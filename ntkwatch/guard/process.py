"""The state of the process: global flags of torch, and the random state of python, numpy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from ntkwatch.guard.values import SavedContainers, Undo

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")

# Float32 precision has old flags and, from torch 2.9, new ones in a tree of (backend, operation).
_NEW_FLAGS = hasattr(torch._C, "_get_fp32_precision_getter")
_PRECISIONS = (("generic", "all"), *((b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul", "conv", "rnn")))
_Precision = tuple[str, bool, tuple[str, ...]]  # matmul precision, cuDNN's TF32, the new flags in the order above
_EXACT: _Precision = ("highest", False, ("ieee",) * len(_PRECISIONS) if _NEW_FLAGS else ())


def _restore_later(undo: list[Undo], get: Callable[[], Any], put: Callable[[Any], Any], *during: Any) -> None:
    """Remember `get()`, put it back at the end if it moved; meanwhile `during`, if one is given."""
    saved = get()

    def restore() -> None:
        if get() != saved:
            put(saved)

    undo.append(restore)
    if during and saved != during[0]:
        put(during[0])


def guard_flags(undo: list[Undo], recurrent: bool = False) -> None:
    """Set torch's global flags for a probe (gradients on, autocast and TF32 off); `undo` gains what restores them.

    recurrent: some layer uses cuDNN's recurrent kernels, which have no backward pass in evaluation mode.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    _restore_later(undo, torch.is_grad_enabled, torch._C._set_grad_enabled, True)
    for device in _AUTOCAST:
        _keep_autocast(undo, device)
    _restore_later(
        undo, torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False
    )  # or training reuses a cast
    _restore_later(undo, torch.get_default_dtype, torch.set_default_dtype)
    _restore_later(undo, _default_device, torch.set_default_device)
    _restore_later(undo, torch.get_num_threads, torch.set_num_threads)
    _restore_later(undo, _determinism, lambda saved: torch.use_deterministic_algorithms(saved[0], warn_only=saved[1]))
    _restore_later(undo, _anomaly, _set_anomaly, (False, True))
    _restore_later(undo, torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
    for name, during in {"enabled": (False,) * recurrent, "deterministic": (), "benchmark": (False,)}.items():
        _restore_later(undo, partial(getattr, cudnn, name), partial(setattr, cudnn, name), *during)
    for name in ("flash", "mem_efficient", "math", "cudnn"):
        if hasattr(cuda, f"{name}_sdp_enabled"):
            _restore_later(undo, getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"))
    _restore_later(undo, _read_precision, _write_precision, _EXACT)
    _guard_global_hooks(undo)
    _guard_parametrizations(undo)
    _force_eager(undo)


def _guard_global_hooks(undo: list[Undo]) -> None:
    """Hooks on every module: forward ones run, backward ones listen to training and do not."""
    boxes = SavedContainers()
    undo.append(boxes.restore)
    for name, box in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and isinstance(box, dict):
            boxes.keep(box)
            if "backward" in name:
                box.clear()


def _guard_parametrizations(undo: list[Undo]) -> None:
    """Inside `parametrize.cached()` a probe would get training's weights, and training the probe's."""
    undo.append(partial(setattr, parametrize, "_cache", parametrize._cache))
    _restore_later(undo, lambda: parametrize._cache_enabled, partial(setattr, parametrize, "_cache_enabled"), 0)
    parametrize._cache = {}


def _keep_autocast(undo: list[Undo], device: str) -> None:
    try:
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    except RuntimeError:  # this build of torch knows no such device
        return
    _restore_later(
        undo, lambda: torch.is_autocast_enabled(device), lambda on: torch.set_autocast_enabled(device, on), False
    )
    _restore_later(
        undo, lambda: torch.get_autocast_dtype(device), lambda dtype: torch.set_autocast_dtype(device, dtype)
    )


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _anomaly() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def _set_anomaly(state: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*state)


def _force_eager(undo: list[Undo]) -> None:
    """Compiled functions run uncompiled, so that a probe's shapes make no new graphs."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and hasattr(frames, "_set_stance"):  # torch ≥ 2.6, and something has been compiled
        _restore_later(undo, lambda: frames._stance, frames._set_stance)
        torch.compiler.set_stance("force_eager")


def _read_precision() -> _Precision:
    """TF32 and matmul precision as they were set, in the old flags and the new.

    A new flag that is unset answers with its parent's value, so a parent that is set is cleared while its children are
    read. An old flag raises where the new ones disagree, so those are made to agree while it is read.
    """
    read: list[str] = []
    try:
        for pair in _PRECISIONS if _NEW_FLAGS else ():
            read.append(torch._C._get_fp32_precision_getter(*pair))
            if pair[1] == "all" and read[-1] != "none":
                torch._C._set_fp32_precision_setter(*pair, "none")
        matmul = _old_flag(torch.get_float32_matmul_precision, None)
        cudnn = _old_flag(lambda: torch.backends.cudnn.allow_tf32, True)
    finally:
        _write_new(read)
    return matmul, cudnn, tuple(read)


def _old_flag(read: Callable[[], Any], otherwise: Any) -> Any:
    """The flag; where it raises, what it says once the new ones are exact, and `otherwise` if it still disagrees."""
    try:
        return read()
    except RuntimeError:
        _write_new(_EXACT[2])
    try:
        return read()
    except RuntimeError:
        return otherwise


def _write_new(values: Sequence[str]) -> None:
    for pair, value in zip(_PRECISIONS, values, strict=False):
        torch._C._set_fp32_precision_setter(*pair, value)


def _write_precision(state: _Precision) -> None:
    torch.set_float32_matmul_precision(state[0])
    torch.backends.cudnn.allow_tf32 = state[1]
    _write_new(state[2])


def guard_generators(undo: list[Undo]) -> None:
    """Save the random state of Python, NumPy and torch (CPU, started GPUs); `undo` gains what restores it."""
    sources: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (lambda: np.random.get_state(legacy=False), np.random.set_state),  # noqa: NPY002 the run's, not ours
        (torch.get_rng_state, torch.set_rng_state),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        sources.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    else:  # seeds wait in a queue for CUDA's start
        queue = SavedContainers()
        queue.keep(torch.cuda._queued_calls)
        undo.append(queue.restore)
    if torch.backends.mps.is_available():
        sources.append((torch.mps.get_rng_state, torch.mps.set_rng_state))
    for get, put in sources:
        undo.append(partial(_put_back, get, put, get()))


def _put_back(get: Callable[[], Any], put: Callable[[Any], object], state: Any) -> None:
    """Where it has moved: a generator of CUDA that is set, even to its own state, has cuDNN draw its dropout anew.

    Where the comparison fails (for want of memory, say), it may have moved.
    """
    try:
        moved = not _same(get(), state)
    except Exception:
        moved = True
    if moved:
        put(state)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(np.array_equal(a, b))

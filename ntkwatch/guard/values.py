"""Save values and put them back: tensors by bytes, containers by items, generators and arrays by their state."""

from __future__ import annotations

import operator
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Undo = Callable[[], None]  # idempotent: where a signal cuts one off, it runs again

_LARGE = 100_000  # items; beyond it a list or dict is not copied, what was appended is taken off again
_FRAMEWORKS = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "ntkwatch", "builtins"}
_CONTAINERS = (dict, list, set, deque)
GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


class GuardError(RuntimeError):
    """A probe changed what cannot be put back, or a part of the run could not be saved."""


def has_plain_storage(tensor: Tensor) -> bool:
    """True where a byte copy says all: strided, with storage; no DTensor, fake, quantized or functorch wrapper."""
    if is_traceable_wrapper_subclass(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    try:
        return tensor.data_ptr() is not None
    except RuntimeError:
        return False


def saved_bytes(tensors: Sequence[Tensor]) -> Iterator[Undo]:
    """One flat copy per device and dtype; compared by bytes (NaN and −0 count), written back only where it differs.

    Storage, shape and the count of changes come back too.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for group in groups.values():
        saved = [(t, t.detach(), t.data_ptr(), None if t.is_inference() else t._version) for t in group]
        yield partial(_restore_bits, saved, _flat(group))


def _restore_bits(saved: list[tuple[Tensor, Tensor, int, int | None]], flat: Tensor) -> None:
    for tensor, data, where, version in saved:
        if is_data_replaced(tensor, data, where) and version is not None:
            tensor.data = data
    if not _equal(_flat([tensor for tensor, *_ in saved]), flat):
        parts = flat.split([data.numel() for _, data, *_ in saved])
        for (tensor, data, _, version), part in zip(saved, parts, strict=True):
            if not _equal(_flat([tensor]), part):
                with torch.inference_mode() if version is None else torch.no_grad():
                    tensor.copy_(part.view(data.shape))
    for tensor, _, _, version in saved:
        if version is not None and tensor._version != version:
            _set_version(tensor, version)


def is_data_replaced(tensor: Tensor, data: Tensor, where: int) -> bool:
    """Whether `.data` of the tensor is not what it was."""
    return tensor.data_ptr() != where or tensor.dtype != data.dtype or tensor.shape != data.shape


@torch.no_grad()
def _flat(tensors: list[Tensor]) -> Tensor:
    flat = [tensor if tensor.ndim == 1 else tensor.reshape(-1) for tensor in tensors]
    return torch.cat(flat).detach()


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _set_version(tensor: Tensor, version: int) -> None:
    """A graph of the run may hold the tensor: its bits are as they were, so is the count of its changes."""
    put: Any = torch._C._autograd._unsafe_set_version_counter
    try:
        put((tensor,), (version,))
    except TypeError:  # torch < 2.6
        put(tensor, version)


class SavedContainers:
    """The very items of dicts, lists, sets and deques, in their order.

    Most of a module's boxes are empty dicts of hooks; these cost one reference each and no copy. A list or dict of more
    than 100,000 items is too dear to copy: only growth is undone.
    """

    def __init__(self) -> None:
        self.empty: list[Any] = []
        self.full: list[tuple[Any, Any]] = []
        self.large: list[tuple[Any, int]] = []

    def keep(self, box: Any) -> None:
        """Save the items of one container, up to 100,000; a second call for the same one has no effect."""
        self.keep_all([box])

    def keep_all(self, boxes: list[Any]) -> None:
        """Save several containers."""
        self.empty += [box for box in boxes if not box]
        large = [box for box in boxes if len(box) > _LARGE and isinstance(box, list | dict)]
        self.large += [(box, len(box)) for box in large]
        copied = [box for box in boxes if box and not any(box is other for other in large)] if large else boxes
        self.full += [(box, dict(box) if isinstance(box, dict) else list(box)) for box in copied if box]

    def restore(self) -> None:
        """Put back the saved items of every container; may run more than once."""
        for box in self.empty:
            if box:
                _base(box).clear(box)
        for box, saved in self.full:
            if isinstance(box, dict):
                if not same(box, saved):
                    _base(box).clear(box)
                    _base(box).update(box, saved)
            elif len(box) != len(saved) or not all(map(operator.is_, box, saved)):
                _base(box).clear(box)
                (_base(box).update if isinstance(box, set) else _base(box).extend)(box, saved)
        for box, size in self.large:
            while len(box) > size:
                (_base(box).popitem if isinstance(box, dict) else _base(box).pop)(box)
            if len(box) < size:
                raise GuardError(f"a probe took {size - len(box)} of {size} items out of a {type(box).__name__}")


def _base(box: Any) -> Any:
    """The built-in kind, past a subclass's own `clear` and `update`."""
    return next(kind for kind in (OrderedDict, *_CONTAINERS) if isinstance(box, kind))


def same(box: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """The very same keys in the same order with the very same values."""
    if len(box) != len(saved):
        return False
    return all(map(operator.is_, box.values(), saved.values())) and all(map(operator.is_, box, saved))


def is_container(value: object) -> bool:
    """Whether a value is a dict, list, set or deque, whose items can be saved."""
    return isinstance(value, _CONTAINERS)


def stateful(value: object) -> Undo | None:
    """How to put back a generator or an array that a module keeps; None for anything else."""
    if isinstance(value, torch.Generator):
        return partial(_call, value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(_call, value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(_call, value.set_state, value.get_state(legacy=False))
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def generators_of(function: object) -> Iterator[object]:
    """Random generators that a function of the user's reaches without an argument: module variables and closures."""
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        yield from (value for value in (*function.__globals__.values(), *cells) if isinstance(value, GENERATORS))


def counters_of(function: object) -> Iterator[tuple[CellType, object]]:
    """The cells of a function's closure that hold a plain value, which a `nonlocal` statement changes."""
    cells = (function.__closure__ or ()) if isinstance(function, FunctionType) else ()
    yield from ((cell, cell.cell_contents) for cell in cells if cell != CellType() and _is_plain(cell.cell_contents))


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | Tensor)


def is_users_object(value: object) -> bool:
    """Whether a value is an object of a class of neither Python nor a framework, which a model may write to.

    Trainers, loggers and the like keep no state of a forward pass, and reach the whole run.
    """
    if isinstance(value, type | FunctionType | MethodType | ModuleType | Tensor):
        return False
    package = type(value).__module__.partition(".")[0]
    return isinstance(value, SimpleNamespace) or not (package in _FRAMEWORKS or package in sys.stdlib_module_names)


def slots_of(value: object) -> dict[str, object]:
    """What an object holds in `__slots__`, by name."""
    names: list[str] = []
    for kind in type(value).__mro__:
        own = kind.__dict__.get("__slots__", ())
        names += [own] if isinstance(own, str) else list(own)
    return {name: getattr(value, name) for name in names if not name.startswith("__") and hasattr(value, name)}


def restore_slots(value: object, saved: dict[str, object]) -> None:
    """Put back what `slots_of` gave."""
    for name in slots_of(value).keys() - saved.keys():
        delattr(value, name)
    for name, item in saved.items():
        if getattr(value, name, saved) is not item:
            object.__setattr__(value, name, item)


def array(value: object) -> Undo | None:
    """How to put back an array that a module keeps."""
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return partial(value.__setitem__, ..., value.copy())
    return None


def put_back(undo: list[Undo]) -> list[BaseException]:
    """Run every undo, newest first; one that fails does not keep the others, one that a signal cuts off runs again.

    A signal comes back without its traceback. This frame is in it, and would be kept with all that the signal left
    open, such as a mode of torch's, until a garbage collection in the midst of training closes that.
    """
    troubles: list[BaseException] = []
    while undo:
        try:
            while undo:
                undo[-1]()
                undo.pop()
        except Exception as fault:
            troubles.append(fault)
            undo.pop()
        except BaseException as signal:  # KeyboardInterrupt, or SystemExit from a handler
            troubles.append(signal.with_traceback(None))
    return troubles


def _call(put: Callable[[Any], object], state: Any) -> None:
    put(state)

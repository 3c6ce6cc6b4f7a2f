"""What hangs on the modules of a run: saved as it is, silenced for the probe, given back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.distributed import spread
from ntkwatch.guard.values import (
    GuardError,
    SavedContainers,
    Undo,
    array,
    counters_of,
    generators_of,
    has_plain_storage,
    is_container,
    is_data_replaced,
    is_users_object,
    restore_slots,
    same,
    saved_bytes,
    slots_of,
    stateful,
)

_TORCH_OWNED = frozenset(vars(nn.Module()))
_TORCH_BOXES = tuple(name for name, value in vars(nn.Module()).items() if is_container(value))  # parameters, hooks, …
_ATOMS = frozenset({int, float, bool, str, type(None)})
_WALK_DEPTH = 3  # containers in containers of a module's attributes that are looked into
_WALK_ITEMS = 1000  # and how far: a list of every loss of a run is kept whole but not searched for tensors
_STASH_BYTES = 16 << 20  # tensors in lists and dicts (metrics gather whole epochs) are copied up to here, then watched


class Modules:
    """All modules that can be reached, and what they hold, gathered in one walk; nothing changes before `guard`."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self.roots = roots
        self.modules: list[nn.Module] = []
        self.leaves: dict[int, Tensor] = {}  # parameters and other leaves that collect a gradient: watched, not copied
        self.state: dict[int, Tensor] = {}  # buffers and tensors kept as attributes: copied
        self.stashed: dict[int, Tensor] = {}  # tensors kept in lists and dicts: copied up to a limit, the rest watched
        self.boxes, self.owned = SavedContainers(), SavedContainers()  # of the user's; of torch's own
        self.undo: list[Undo] = []
        self.seen: set[int] = set()
        self.todo: list[nn.Module] = list(roots)
        while self.todo:
            module = self.todo.pop()
            if id(module) not in self.seen:
                self.seen.add(id(module))
                self._gather(module)
        managers = {spread(kind) for kind in {*map(type, self.modules), *map(type, self.leaves.values())}} - {None}
        self.sharded = bool(managers)  # then the attributes that torch owns are FSDP's to change
        self.aloof = "FullyShardedDataParallel" in managers  # FSDP1 keeps state in the others too

    def recurrent_on_gpu(self) -> bool:
        """Whether some layer would run in cuDNN's recurrent kernels."""
        return any(isinstance(m, nn.RNNBase) and any(p.is_cuda for p in m.parameters()) for m in self.modules)

    def _gather(self, module: nn.Module) -> None:
        self.modules.append(module)
        if isinstance(module, torch.jit.ScriptModule):  # its attributes live in C++
            self.todo.extend(module.children())
            self.leaves.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
            self.state.update((id(buffer), buffer) for buffer in module.buffers(recurse=False))
            return
        held = vars(module)
        self.todo.extend(child for child in module._modules.values() if child is not None)
        for parameter in module._parameters.values():
            if parameter is not None:
                self._parameter(module, parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                self._tensor(buffer, self.state)
        if id(forward := type(module).forward) not in self.seen:
            self.seen.add(id(forward))
            self.undo.extend(filter(None, map(stateful, generators_of(forward))))
            self.undo.extend(partial(setattr, cell, "cell_contents", value) for cell, value in counters_of(forward))
        self.owned.keep_all([held[name] for name in _TORCH_BOXES if name in held])
        for key in held.keys() - _TORCH_OWNED:
            self._attribute(held[key], _WALK_DEPTH)

    def _parameter(self, module: nn.Module, parameter: Tensor) -> None:
        if nn.parameter.is_lazy(parameter):
            raise GuardError(
                f"{type(module).__name__} has parameters that are not initialised yet (a lazy module), "
                "and a probe would initialise them; run the model on one batch before training"
            )
        if (
            isinstance(module, nn.Embedding | nn.EmbeddingBag)
            and module.max_norm is not None
            and has_plain_storage(parameter)
        ):
            self.state[id(parameter)] = parameter  # its forward renormalises the rows that it reads, in place
        self.leaves[id(parameter)] = parameter

    def _attribute(self, value: object, depth: int) -> None:
        """Tensors, generators, containers and unregistered modules among a module's own attributes."""
        if type(value) in _ATOMS:
            return
        if isinstance(value, Tensor):
            self._tensor(value, self.state if depth == _WALK_DEPTH else self.stashed)
        elif isinstance(value, nn.Module):
            self.todo.append(value)
        elif is_container(value) or isinstance(value, tuple):
            self._box(value, depth)
        elif (restore := stateful(value) or array(value)) is not None:
            self.undo.append(restore)
        elif is_users_object(value):
            self._box(getattr(value, "__dict__", {}), depth)
            self._slots(value, depth)

    def _box(self, box: Any, depth: int) -> None:
        if not depth or id(box) in self.seen:
            return
        self.seen.add(id(box))
        if is_container(box):
            self.boxes.keep(box)
        for item in islice(box.values() if isinstance(box, dict) else box, _WALK_ITEMS):
            self._attribute(item, depth - 1)

    def _slots(self, value: object, depth: int) -> None:
        """Attributes of an object that it keeps in `__slots__`."""
        held = slots_of(value)
        if held and depth and id(value) not in self.seen:
            self.seen.add(id(value))
            self.undo.append(partial(restore_slots, value, held))
            for item in held.values():
                self._attribute(item, depth - 1)

    def _tensor(self, tensor: Tensor, destination: dict[int, Tensor]) -> None:
        if tensor.requires_grad and tensor.is_leaf:
            self.leaves.setdefault(id(tensor), tensor)
        elif id(tensor) not in self.state and has_plain_storage(tensor):
            destination[id(tensor)] = tensor

    def guard(self, undo: list[Undo]) -> None:
        """Save, then disturb: evaluation mode, no gradients, no backward hooks, no compiled calls, no logging."""
        copied, room = list(self.state.values()), _STASH_BYTES
        watched = [leaf for key, leaf in self.leaves.items() if key not in self.state]
        for tensor in self.stashed.values():
            room -= tensor.numel() * tensor.element_size()
            (copied if room >= 0 else watched).append(tensor)
        undo.append(_unmoved(watched, self.roots))
        undo.extend([*([] if self.aloof else [self.boxes.restore]), *self.undo])
        undo.extend(saved_bytes(copied))
        if not self.sharded:
            undo.append(self.owned.restore)
            _guard_leaves([leaf for leaf in self.leaves.values() if leaf.is_leaf and has_plain_storage(leaf)], undo)
        _guard_attributes(self.modules, undo, self.sharded, self.aloof)


def _unmoved(tensors: list[Tensor], modules: Sequence[nn.Module]) -> Undo:
    """Complain of tensors that were changed in place though nothing kept a copy of them."""
    versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def check() -> None:
        moved = {id(tensor) for tensor, version in versions if tensor._version != version}
        if moved:
            names = dict.fromkeys(name for m in modules for name, p in m.named_parameters() if id(p) in moved)
            raise GuardError(
                f"a probe changed {', '.join(names) or 'a tensor in a list or dict of a module'} in place, "
                "which cannot be undone; look for an in-place operation on it in what the model does in evaluation mode"
            )

    return check


def _guard_leaves(leaves: list[Tensor], undo: list[Undo]) -> None:
    """Gradient, data and gradient hooks of parameters: the same objects afterwards, none meanwhile."""
    saved = [(leaf, leaf.detach(), leaf.data_ptr(), leaf.requires_grad, leaf.grad) for leaf in leaves]
    hooks = SavedContainers()
    undo += [partial(_restore_leaves, saved), hooks.restore]
    for leaf in leaves:
        for box in (leaf._backward_hooks, getattr(leaf, "_post_accumulate_grad_hooks", None)):
            if box:
                hooks.keep(box)
                box.clear()
        if leaf.grad is not None and _reassignable(leaf):
            leaf.grad = None


def _reassignable(leaf: Tensor) -> bool:
    """Whether torch would take the gradient back (not where its type was changed behind torch's back)."""
    try:
        leaf.grad = leaf.grad
    except (RuntimeError, TypeError):
        return False
    return True


def _restore_leaves(saved: list[tuple[Tensor, Tensor, int, bool, Tensor | None]]) -> None:
    for leaf, data, where, requires_grad, grad in saved:
        if is_data_replaced(leaf, data, where):
            leaf.data = data
        if leaf.requires_grad != requires_grad:
            leaf.requires_grad_(requires_grad)
        if leaf.grad is not grad:
            leaf.grad = grad


def _guard_attributes(modules: list[nn.Module], undo: list[Undo], sharded: bool, aloof: bool) -> None:
    others = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    saved = [(m, type(m), _users(m, aloof) if sharded else dict(vars(m))) for m in others]
    undo.append(partial(_restore_attributes, saved, sharded, aloof))
    for module in others:
        vars(module)["training"] = (
            False  # not `.eval()`: users override it (frozen BatchNorm, LoRA that merges weights)
        )
        if not aloof:
            _silence(module, sharded)
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            undo.append(partial(setattr, module, "training", module.training))
            module.training = False


def _silence(module: nn.Module, sharded: bool) -> None:
    held = vars(module)
    if held.get("_compiled_call_impl") is not None:
        held["_compiled_call_impl"] = None
    if not sharded:  # emptied in place: whoever removes a hook meanwhile holds the same dict
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    if "_current_fx_name" in held and hasattr(type(module), "log_dict"):  # a LightningModule whose forward logs
        held["log"] = held["log_dict"] = _ignore


def _ignore(*args: object, **kwargs: object) -> None:
    """Stands in for `self.log`: a probe's forward adds nothing to what the run logs."""


def _users(module: nn.Module, aloof: bool) -> dict[str, Any]:
    """What a probe may put back in the attributes of a sharded model: not what FSDP keeps there."""
    return {k: v for k, v in vars(module).items() if k == "training" or not (aloof or k in _TORCH_OWNED)}


def _restore_attributes(saved: list[tuple[nn.Module, type, dict[str, Any]]], sharded: bool, aloof: bool) -> None:
    for module, kind, attributes in saved:
        held = vars(module)
        if type(module) is not kind:
            module.__class__ = kind
        if sharded:
            for key in [] if aloof else [k for k in held if k not in attributes and k not in _TORCH_OWNED]:
                del held[key]
            held.update(attributes)
        elif not same(held, attributes):
            held.clear()
            held.update(attributes)

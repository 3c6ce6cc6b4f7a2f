"""Shadow: a torch optimizer's own rule on other parameters, step for step; what it cannot repeat exactly it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

Rates = list[dict[str, Any]]  # the settings of an optimizer's parameter groups, without the parameters
Clip = Callable[[Sequence[Tensor]], Any]
COPYABLE_TYPES = (bool, int, float, str, type(None))
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class NotRepeatable(ValueError):
    """What the run does with its weights is not what its optimizer's rule, repeated elsewhere, would do; says what."""


class OptimizerCopy:
    """A copy of `optimizer` that trains `mine` in the place of `theirs`, by name, from the optimizer's first step on.

    Momentum, weight decay, parameter groups and Adam's moments are those of the optimizer's own class, not
    approximations of them; rates come from the optimizer at every step. The optimizer itself is only read.

    Raises:
        ValueError: an optimizer that trains none of `theirs`, or trains others as well; that needs a closure; that has
            hooks, a replaced `step` or attributes which a copy would not have.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]
    ) -> None:
        if (reason := _why_not_copyable(optimizer)) is not None:
            raise ValueError(reason)
        self._mine = dict(mine)
        self._optimizer, self._state = optimizer, optimizer.state
        self._layout, self._held = _group_ids(optimizer), _state_count(optimizer)
        named = {id(p): mine[name] for name, p in theirs.items()}
        others = sum(id(p) not in named for g in optimizer.param_groups for p in g["params"] if p.requires_grad)
        if len(named.keys() & set().union(*self._layout)) == 0:
            raise ValueError("the optimizer trains none of the model's parameters")
        if others:
            raise ValueError(f"the optimizer also trains {others} parameters that are not among the model's")
        self._places = [i for i, ids in enumerate(self._layout) if named.keys() & set(ids)]
        self._copy = _copied(optimizer, [optimizer.param_groups[i] for i in self._places], named)

    @property
    def has_stepped(self) -> bool:
        """Whether the optimizer has; some lay out their state, at step 0, when they are made."""
        return any(held and float(held.get("step", 1)) > 0 for held in self._optimizer.state.values())

    def rates(self) -> Rates:
        """Learning rates and every other setting of the optimizer's parameter groups, as they stand."""
        groups = [self._optimizer.param_groups[i] for i in self._places]
        return [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in g.items() if key != "params"}
            for g in groups
        ]

    def changed(self, now: torch.optim.Optimizer | None = None) -> str | None:
        """Why the optimizer (of now) is no longer the one that was copied, None where it is."""
        if now is not None and now is not self._optimizer:
            return f"the run's optimizer was replaced by another {type(now).__name__}"
        if _group_ids(self._optimizer) != self._layout:
            return "the parameters of the optimizer's groups have changed"
        if self._optimizer.state is not self._state or _state_count(self._optimizer) < self._held:
            return "the optimizer's state was reset or loaded anew"
        self._held = _state_count(self._optimizer)
        return _why_hooks_prevent_copy(self._optimizer)

    def step(self, rates: Rates, after: Rates, clip: Clip | None = None) -> None:
        """Step on the `.grad` of `mine`, clipped first, as the optimizer stepped with these rates.

        after: the rates once the optimizer had stepped: those that its own step sets, the copy's sets as well.

        Raises:
            NotRepeatable: the rule drew random numbers, of which a copy draws others; or `after` is not what it leaves.
        """
        for group, settings in zip(self._copy.param_groups, rates, strict=True):
            group.update(settings)
        moved = [p for g in self._copy.param_groups for p in g["params"] if p.grad is not None]
        if clip is not None and moved:
            clip(moved)
        before = self._randomness()
        self._copy.step()
        if not all(map(torch.equal, before, self._randomness())):
            raise NotRepeatable(f"{type(self._optimizer).__name__} draws random numbers: no copy repeats its steps")
        if any(
            not _same(g[key], value)
            for g, s in zip(self._copy.param_groups, after, strict=True)
            for key, value in s.items()
        ):
            raise NotRepeatable("the settings of the optimizer's groups changed in its step, and not by its own rule")

    def _randomness(self) -> list[Tensor]:
        devices = {p.device for p in self._mine.values() if p.device.type == "cuda"}
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    def tensors(self) -> dict[str, Tensor]:
        """The copy's state as one flat mapping, `name/key` -> tensor."""
        return {
            f"{name}/{key}": torch.as_tensor(value)
            for name, p in self._mine.items()
            for key, value in self._copy.state.get(p, {}).items()
            if value is not None
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for name, p in self._mine.items():
            prefix = f"{name}/"
            held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if held:
                self._copy.state[p] = {key: v.to(p.device) if v.ndim else v.clone() for key, v in held.items()}


def _same(a: Any, b: Any) -> bool:
    return bool(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b)


def _group_ids(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def _state_count(optimizer: torch.optim.Optimizer) -> int:
    """How many parameters have a state."""
    return sum(map(bool, optimizer.state.values()))


def _why_not_copyable(optimizer: torch.optim.Optimizer) -> str | None:
    """Why a copy would step otherwise than the optimizer does, None where it would not."""
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return f"{name} steps with a closure: the forecast cannot follow it"
    patched = vars(optimizer).get("step")  # torch's schedulers put a counter around it
    if patched is not None and not any(hasattr(patched, flag) for flag in ("_wrapped_by_lr_sched", "_with_counter")):
        return f"the step of this {name} was replaced on the object: the forecast cannot copy it"
    odd = [key for key, value in _own(optimizer).items() if not _is_copyable(value)]
    if odd:
        return f"{name} keeps {odd[0]}, which the forecast cannot copy"
    return _why_hooks_prevent_copy(optimizer)


def _why_hooks_prevent_copy(optimizer: torch.optim.Optimizer) -> str | None:
    hooks = [box for name in HOOKS if (box := getattr(optimizer, name, None))]
    hooks += [box for name in GLOBAL_HOOKS if (box := getattr(torch_optimizer, name, None))]
    return "hooks on the optimizer's step may change it: the forecast cannot follow them" if hooks else None


def _own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the optimizer keeps beside what torch gives every optimizer."""
    every = vars(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    return {key: value for key, value in vars(optimizer).items() if key not in every and key != "step"}


def _is_copyable(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_copyable, value))
    return isinstance(value, COPYABLE_TYPES)


def _copied(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], named: Mapping[int, Tensor]
) -> torch.optim.Optimizer:
    """An optimizer of the same class, settings and plain attributes on other parameters."""
    copies = [{**g, "params": [named[id(p)] for p in g["params"] if id(p) in named]} for g in groups]
    for copied in copies:
        copied.pop("param_names", None)  # of all the group's parameters, also those that are not trained
    takes = inspect.signature(type(optimizer).__init__).parameters
    defaults = {key: value for key, value in optimizer.defaults.items() if key in takes}
    try:
        found = type(optimizer)(copies, **defaults)
    except Exception as error:  # a class of the user's own takes what it likes
        raise ValueError(f"{type(optimizer).__name__} cannot be copied ({error})") from error
    vars(found).update({key: list(v) if isinstance(v, list) else v for key, v in _own(optimizer).items()})
    return found

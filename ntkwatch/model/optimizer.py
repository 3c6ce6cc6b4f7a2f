"""A torch optimizer → what it makes of the kernel: heavy ball on J S Jᵀ, S the learning rates over a preconditioner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SUPPORTED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
NO_OPTIMIZER = (
    "no optimizer is known: give measure(step, optimizer=...); a run with several has no one rule, and a baseline that "
    "waited for the rows of a stream has lost its own"
)


@dataclass(frozen=True)
class UpdateRule:
    """V ← βV + ∇, θ ← θ − factor·S·V with S = lr/D, the form that SGD with momentum and Adam share.

    Attributes:
        name: the optimizer's class.
        lr: parameter name -> its group's learning rate; 0 where the optimizer does not train it.
        momentum, nesterov: β of heavy ball, or β1 of Adam.
        factor: 1 − dampening; for Adam (1 − β1)/(1 − β1^t), the average's weight and its early correction.
        preconditioner: parameter name -> D = √v̂ + ε of Adam's own state; None for SGD.
        decay: parameter name -> weight decay, as the optimizer holds it.
    """

    name: str
    lr: Mapping[str, float]
    momentum: float = 0.0
    nesterov: bool = False
    factor: float = 1.0
    preconditioner: Mapping[str, Tensor] | None = None
    decay: Mapping[str, float] | None = None

    @property
    def uniform(self) -> float | None:
        """The one learning rate of every parameter, where S is just that number."""
        rates = set(self.lr.values())
        return rates.pop() if self.preconditioner is None and len(rates) == 1 else None

    @property
    def largest_lr(self) -> float:
        """Of all groups: the one that `max_stable_lr` scales."""
        return max(self.lr.values())

    def scales(self) -> dict[str, Tensor | float]:
        """S by parameter name: lr, or lr/D where there is a preconditioner (0 where it has no state)."""
        if self.preconditioner is None:
            return dict(self.lr)
        return {
            name: lr / self.preconditioner[name] if name in self.preconditioner else 0.0 for name, lr in self.lr.items()
        }


def read_rule(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, Tensor]) -> UpdateRule | str:
    """The rule that `optimizer` trains these parameters by, or why it has none of the form above, in one sentence."""
    if optimizer is None:
        return NO_OPTIMIZER
    if not isinstance(optimizer, SUPPORTED_OPTIMIZERS):
        return f"{type(optimizer).__name__} is not SGD, Adam or AdamW: its rule on the kernel is not known"
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    own = {name: groups[id(p)] for name, p in parameters.items() if id(p) in groups}
    if not own:
        return "the optimizer trains none of the model's parameters"
    if any(group.get("maximize") for group in own.values()):
        return "the optimizer maximizes"
    lr = {name: float(own[name]["lr"]) if name in own else 0.0 for name in parameters}
    if max(lr.values()) == 0:
        return "the learning rate is 0"
    decay = {name: float(own[name]["weight_decay"]) if name in own else 0.0 for name in parameters}
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd(name, lr, decay, own)
    return _adam(name, lr, decay, own, {key: optimizer.state.get(parameters[key]) for key in own})


def _sgd(name: str, lr: dict[str, float], decay: dict[str, float], own: Mapping[str, Any]) -> UpdateRule | str:
    rules = {(float(g["momentum"]), float(g["dampening"]), bool(g["nesterov"])) for g in own.values()}
    if len(rules) > 1:
        return "the parameter groups have different momentum: there is no one stability limit"
    momentum, dampening, nesterov = rules.pop()
    factor = 1 - dampening if momentum else 1.0  # torch ignores dampening without momentum
    return UpdateRule(name, lr, momentum, nesterov, factor, decay=decay)


def _adam(
    name: str, lr: dict[str, float], decay: dict[str, float], own: Mapping[str, Any], state: Mapping[str, Any]
) -> UpdateRule | str:
    rules = {(float(g["betas"][0]), bool(g["amsgrad"])) for g in own.values()}
    if len(rules) > 1:
        return "the parameter groups have different β1: there is no one stability limit"
    stepped = {key: s for key, s in state.items() if s and "exp_avg_sq" in s}
    if not stepped:
        return f"{name} has made no step yet: there are no second moments to precondition by"
    beta1, amsgrad = rules.pop()
    step = max(float(s["step"]) for s in stepped.values())
    if step <= 0:
        return f"{name} has made no step yet: there are no second moments to precondition by"
    moment = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
    d = {}
    for key, s in stepped.items():
        correction = 1 - float(own[key]["betas"][1]) ** float(s["step"])
        d[key] = (s[moment].detach().double() / correction).sqrt() + float(own[key]["eps"])
    return UpdateRule(name, lr, beta1, False, (1 - beta1) / (1 - beta1**step), d, decay)

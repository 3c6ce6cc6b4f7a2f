"""Output-scale intervention: the same LightningModule, lazier or richer, in one line.

Training f̃ = (f − f_0)/γ instead of f, at rates that keep the speed of the outputs, changes how far the weights have to
move and nothing else: γ ≪ 1 makes a run lazy, γ ≫ 1 rich (Chizat et al. 2019; Geiger et al. 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.model.wrappers import unfused

KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
START = "ntkwatch_f_0"


def twins(module: Any, gamma: float = 10.0) -> tuple[Any, Any]:
    """(lazy, rich): two copies of the module with outputs (f − f_0)·γ and (f − f_0)/γ, rates scaled to match.

        lazy, rich = twins(MyModule(), gamma=10)
        trainer_a.fit(lazy, loaders); trainer_b.fit(rich, loaders)

    Raises ValueError for γ ≤ 1, and as `output_scale` does.
    """
    if not gamma > 1:
        raise ValueError(f"gamma must be above 1; got {gamma}; 10 sets the twins a hundredfold apart")
    return output_scale(module, 1 / gamma), output_scale(module, gamma)


def output_scale(module: Any, gamma: float, *, lr_factor: float | None = None) -> Any:
    """A copy of a LightningModule whose `forward` returns (f − f_0)/γ, with its optimizers' settings scaled to match.

    Rules: SGD lr·γ² and weight decay/γ², Adam and AdamW lr·γ, ε/γ and weight decay/γ (lr·weight decay is kept);
    gradients are clipped at the size that they have without the scale; schedulers' rates as the optimizer's. The module
    must compute its loss from what calling itself returns (`self(x)`), one float tensor.

    Args:
        module: the user's LightningModule, left as it is.
        gamma: γ > 0, relative to the module as it is: below 1 lazier, above 1 richer.
        lr_factor: replaces the rules' factor on the learning rate, where γ ≫ 1 makes it too large (of depth L the best
            goes as γ^(2/L) there, Atanasov et al. 2024).

    Raises:
        ValueError: γ or lr_factor not positive. TypeError, in training: an output that is not one tensor, an optimizer
            other than SGD, Adam or AdamW.
    """
    for name, value in (("gamma", gamma), ("lr_factor", 1.0 if lr_factor is None else lr_factor)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}; 1 changes nothing")
    scaled = copy.deepcopy(module)
    start = copy.deepcopy(module).requires_grad_(False)
    scaled.__class__ = type(type(module).__name__, (_Scaled, type(module)), {"__module__": type(module).__module__})
    # In a tuple, so that it is no submodule: f_0 is not trained, counted, or in the state dict.
    object.__setattr__(scaled, "_output_scale", (float(gamma), lr_factor, start))
    return scaled


class _Scaled:
    """Mixed in before the user's class."""

    _output_scale: tuple[float, float | None, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(f − f_0)/γ."""
        gamma, _, start = self._output_scale
        with unfused():  # and both in one gradient mode: at θ_0 f and f_0 are equal to the last bit
            f = super().forward(*args, **kwargs)  # type: ignore[misc]
            if not isinstance(f, Tensor) or not f.is_floating_point():
                raise TypeError(f"forward must return one float tensor to scale; got {type(f).__name__}")
            f_0 = _at_rest(start, self).forward(*args, **kwargs)
        return (f - f_0.to(f)) / gamma

    def configure_optimizers(self) -> Any:
        """The user's own, rescaled."""
        gamma, lr_factor, _ = self._output_scale
        configured = super().configure_optimizers()  # type: ignore[misc]
        optimizers, schedulers = _parts(configured)
        factors = {id(o): _rescale(o, gamma, lr_factor) for o in optimizers}
        for scheduler in schedulers:
            _rescale_schedule(scheduler, factors.get(id(getattr(scheduler, "optimizer", None)), 1.0))
        return configured

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Gradients are 1/γ of what they were: clipped at their old size, against the user's own threshold."""
        gamma = self._output_scale[0]
        _multiply_gradients(optimizer, gamma)
        super().configure_gradient_clipping(  # type: ignore[misc]
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )
        _multiply_gradients(optimizer, 1 / gamma)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """f_0 goes into the checkpoint: a resumed run must subtract the same."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint[START] = self._output_scale[2].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The f_0 of the run that is resumed."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if START in checkpoint:
            self._output_scale[2].load_state_dict(checkpoint[START])


def _multiply_gradients(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(factor)


def _at_rest(start: Any, running: Any) -> Any:
    """The frozen copy, on the running module's device and in evaluation mode; BatchNorm as the run has it."""
    parameter = next(running.parameters())
    mine = next(start.parameters())
    if mine.device != parameter.device:
        start.to(parameter.device)
    for module, other in zip(start.modules(), running.modules(), strict=True):
        module.training = other.training and isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    return start


def _parts(configured: Any) -> tuple[list[torch.optim.Optimizer], list[Any]]:
    """Optimizers and schedulers in whatever form `configure_optimizers` may return them."""
    optimizers: dict[int, torch.optim.Optimizer] = {}
    schedulers: dict[int, Any] = {}

    def visit(item: Any) -> None:
        if isinstance(item, torch.optim.Optimizer):
            optimizers[id(item)] = item
        elif isinstance(item, Mapping):
            for value in item.values():
                visit(value)
        elif isinstance(item, Iterable) and not isinstance(item, str):
            for value in item:
                visit(value)
        elif hasattr(item, "step") and hasattr(item, "optimizer"):
            schedulers[id(item)] = item

    visit(configured)
    return list(optimizers.values()), list(schedulers.values())


def _rescale(optimizer: torch.optim.Optimizer, gamma: float, lr_factor: float | None) -> float:
    """Scale the optimizer's groups in place; returns the factor on its learning rates."""
    if not isinstance(optimizer, KNOWN):
        raise TypeError(f"the output scale has rules for SGD, Adam and AdamW; got {type(optimizer).__name__}")
    sgd = isinstance(optimizer, torch.optim.SGD)
    factor = lr_factor if lr_factor is not None else gamma**2 if sgd else gamma
    for group in (*optimizer.param_groups, optimizer.defaults):
        for key in RATES:
            if key in group:
                group[key] = group[key] * factor
        group["weight_decay"] = group["weight_decay"] / factor
        if not sgd:
            group["eps"] = group["eps"] / gamma
    return factor


def _rescale_schedule(scheduler: Any, factor: float) -> None:
    """Rates that a scheduler keeps for itself."""
    for name in ("base_lrs", "_last_lr", "min_lrs", "max_lrs"):
        if isinstance(rates := getattr(scheduler, name, None), list):
            setattr(scheduler, name, [rate * factor for rate in rates])
    if isinstance(lowest := getattr(scheduler, "eta_min", None), int | float):
        scheduler.eta_min = lowest * factor

"""What the linearised network would have done: trained beside the run, on its batches, by a copy of its optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.engines.tangent import jvp
from ntkwatch.guard import leave_no_trace
from ntkwatch.losses import LossAt, LossFn, loss_of
from ntkwatch.model import Network, targets_of, to_device
from ntkwatch.statistics import running_statistics

NO_FORECAST = "the forecast needs every training batch: set monitor.forecast = LinearForecast(...) and step it"
Rates = list[dict[str, Any]]  # the settings of an optimizer's parameter groups, without the parameters


class LinearForecast:
    """f_0 + J_0·(θ − θ_0), trained as the run is: the theory's df/dt = −ηΘ_0∇𝓛 with the optimizer's own rule.

    The linear model has its own parameters θ and a copy of the optimizer, so that momentum, weight decay, parameter
    groups, schedules and Adam's moments are the optimizer's own, not approximations of them. It must be given every
    training batch, once, after the run's optimizer stepped on it (and before a scheduler changes the rate):

        forecast = LinearForecast(model, optimizer, loss)      # at θ_0
        for batch in loader:
            ...                                                # the run's own step on `batch`
            forecast.step(batch)
        monitor.forecast = forecast                            # gives loss_if_lazy and forecast_error

    A step costs a forward-mode product and a backward pass at θ_0, about two training steps; memory is three copies of
    the parameters and one of the optimizer's state. Network and loss are taken in evaluation mode at the BatchNorm
    statistics of the start, so a run with dropout or BatchNorm also differs from its forecast by those:
    `gradient_error` says by how much at the first step. Inside a Trainer, `NTKWatch` does all this where
    `loss_if_lazy` or `forecast_error` is among its diagnostics by name.

    Args:
        model: the module at θ_0, or a Network of it.
        optimizer: the run's own, before its first step; any torch optimizer whose `step` needs no closure.
        loss: callable (outputs, targets) -> mean loss; None takes the module's `ntk_loss`.
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.
        targets: callable (batch) -> targets, where they are not the batch's own.
        start: θ_0 and BatchNorm's statistics by name, where the model no longer, or not yet, is at them.
        resumed: `tensors()` of the forecast to go on with, of an optimizer that has stepped since.

    Attributes:
        gradient_error: ‖g_run − g‖/‖g_run‖ of the first step, g the forecast's gradient; None before it, and where the
            run's `.grad` were gone by then.

    Raises:
        ValueError: no loss, or an optimizer that cannot be copied or has stepped already.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        optimizer: torch.optim.Optimizer,
        loss: LossFn | None = None,
        *,
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
        targets: Callable[[Any], Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
        resumed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network = model if isinstance(model, Network) else Network(model, outputs)
        found, self._targets = loss_of(self.network.module, loss), targets or targets_of
        here = {**self.network.parameters, **running_statistics(self.network.module), **(start or {})}
        self._start = {name: tensor.detach().to(self.network.device, copy=True) for name, tensor in here.items()}
        self.parameters = {name: self._start[name].clone() for name in self.network.parameters}
        if resumed is None and _has_stepped(optimizer):
            raise ValueError("the optimizer has stepped already: make the forecast before training, at θ_0")
        self.gradient_error: float | None = None
        self._stepped = resumed is not None
        self._optimizer, self._groups = self._copy(optimizer)
        if resumed is not None:
            self._restore(resumed)
        if isinstance(found, str):  # last: a run that cannot be followed under any loss is not asked for one
            raise ValueError(found)
        self.loss = found

    def step(self, batch: Any) -> float:
        """One training step of the linear model on the batch; returns its loss there, before the step."""
        value = self.add(batch)
        self.apply()
        return value

    def add(self, batch: Any, share: float = 1.0) -> float:
        """Add `share` of the gradient on the batch, one of several that make a step; returns the loss there."""
        batch = to_device(batch, self.network.device)
        targets = self._targets(batch)
        if targets is None:
            raise ValueError("the batch holds no targets: step with the (inputs, targets) that the run trained on")
        with leave_no_trace(self.network.module):
            at = LossAt(self.loss, self._linear(batch), targets)
            self._pull_back(batch, share * at.gradient)
        return at.value

    def apply(self, rates: Rates | None = None, clip: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        """Step on the gradients added since the last one.

        rates: what `rates()` said when the run's optimizer stepped; None: as they are now.
        clip: what the run did to its gradients' size, on the linear model's parameters in place.
        """
        for mine, theirs in zip(self._optimizer.param_groups, rates or self.rates(), strict=True):
            mine.update(theirs)
        moved = [p for p in self.parameters.values() if p.grad is not None]
        if clip is not None and moved:
            clip(moved)
        if not self._stepped:
            self._compare_gradients()
        with leave_no_trace(self.network.module):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def rates(self) -> Rates:
        """Learning rates and every other setting of the run's parameter groups, as they stand."""
        return [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in g.items() if key != "params"}
            for g in self._groups
        ]

    def outputs(self, batch: Any) -> Tensor:
        """The linear model's outputs [n, C] on a batch, float64 on the CPU."""
        with leave_no_trace(self.network.module):
            return self._linear(to_device(batch, self.network.device)).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, as one flat mapping that a resumed forecast is made from."""
        found = {f"theta/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            held = self._optimizer.state.get(p, {})
            found |= {f"state/{name}/{key}": torch.as_tensor(v) for key, v in held.items() if v is not None}
        return found

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"theta/{name}"])
            prefix = f"state/{name}/"
            held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if held:
                self._optimizer.state[p] = {key: v.to(p.device) if v.ndim else v.clone() for key, v in held.items()}

    def _linear(self, batch: Any) -> Tensor:
        direction = {name: p - self._start[name] for name, p in self.parameters.items()}
        f_0, moved, _ = jvp(self.network, batch, self._start, direction)
        return f_0.double() + moved.double()

    def _pull_back(self, batch: Any, gradient: Tensor) -> None:
        """Add J_0ᵀ∇_f𝓛 to the `.grad` of the linear model's parameters."""
        leaves = {name: self._start[name].detach().clone().requires_grad_() for name in self.parameters}
        f = self.network.outputs(batch, {**self._start, **leaves})
        grads = torch.autograd.grad(f, list(leaves.values()), gradient.to(f), allow_unused=True)
        for name, g in zip(leaves, grads, strict=True):
            p = self.parameters[name]
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def _compare_gradients(self) -> None:
        """At the first step both models are at θ_0: their gradients are one, if loss and mode are the run's."""
        self._stepped = True
        run = {name: p.grad.detach().double() for name, p in self.network.parameters.items() if p.grad is not None}
        if not run:
            return
        mine = {name: self.parameters[name].grad for name in run}
        gone = [g.norm() if (m := mine[name]) is None else (m.double() - g).norm() for name, g in run.items()]
        size = torch.stack([g.norm() for g in run.values()]).norm()
        if size > 0:
            self.gradient_error = float(torch.stack(gone).norm() / size)

    def _copy(self, optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
        """An optimizer of the same class and settings on the linear model's parameters, and the groups it copies."""
        mine = {id(p): self.parameters[name] for name, p in self.network.parameters.items()}
        groups = [g for g in optimizer.param_groups if any(id(p) in mine for p in g["params"])]
        if not groups:
            raise ValueError("the optimizer trains none of the model's parameters")
        copies = [{**g, "params": [mine[id(p)] for p in g["params"] if id(p) in mine]} for g in groups]
        takes = inspect.signature(type(optimizer).__init__).parameters
        needs_closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if needs_closure is not None and needs_closure.default is inspect.Parameter.empty:
            raise ValueError(f"{type(optimizer).__name__} steps with a closure: the forecast cannot follow it")
        defaults = {key: value for key, value in optimizer.defaults.items() if key in takes}
        try:
            return type(optimizer)(copies, **defaults), groups
        except (TypeError, ValueError) as error:
            raise ValueError(f"{type(optimizer).__name__} cannot be copied ({error})") from error


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Some optimizers lay out their state, at step 0, when they are made."""
    return any(held and float(held.get("step", 1)) > 0 for held in optimizer.state.values())


def at_probe(forecast: LinearForecast | str, network: Network, batch: Any) -> dict[str, Any]:
    """The forecast's outputs on the batch as `f_lazy`, and how its first gradient met the run's as `lazy_start`."""
    if isinstance(forecast, str):
        return {"f_lazy": forecast, "lazy_start": forecast}
    if unfrozen := network.unfrozen():
        reason = f"{unfrozen[0]} trains now and did not at the baseline: the forecast leaves it out"
        return {"f_lazy": reason, "lazy_start": reason}
    missing = "the forecast has not met the gradients of a first step"
    start = forecast.gradient_error
    return {"f_lazy": forecast.outputs(batch), "lazy_start": missing if start is None else start}

"""What the linearised network would have done: trained beside the run, on its batches, by a copy of its optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.engines.tangent import jvp
from ntkwatch.guard import leave_no_trace
from ntkwatch.losses import LossAt, LossFn, loss_of
from ntkwatch.model import Network, targets_of, to_device
from ntkwatch.statistics import running_statistics


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

    A step costs a forward-mode product and a backward pass at θ_0, about two training steps; memory is two copies of
    the parameters and of the optimizer's state. Network and loss are taken in evaluation mode at the BatchNorm
    statistics of the start, so a run with dropout or BatchNorm also differs from its forecast by those.

    Args:
        model: the module at θ_0.
        optimizer: the run's own, before its first step; any torch optimizer whose `step` needs no closure.
        loss: callable (outputs, targets) -> mean loss; None takes the module's `ntk_loss`.
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.

    Raises:
        ValueError: no loss, or an optimizer that cannot be copied or has stepped already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossFn | None = None,
        *,
        outputs: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.network = Network(model, outputs)
        found = loss_of(self.network.module, loss)
        if isinstance(found, str):
            raise ValueError(found)
        self.loss = found
        statistics = {name: b.detach().clone() for name, b in running_statistics(self.network.module).items()}
        self._start = {name: p.detach().clone() for name, p in self.network.parameters.items()} | statistics
        self.parameters = {name: p.detach().clone() for name, p in self.network.parameters.items()}
        self._run = optimizer
        self._optimizer, self._groups = self._copy(optimizer)

    def step(self, batch: Any) -> float:
        """One training step of the linear model on the batch; returns its loss there, before the step."""
        batch = to_device(batch, self.network.device)
        targets = targets_of(batch)
        if targets is None:
            raise ValueError("the batch holds no targets: step with the (inputs, targets) that the run trained on")
        with leave_no_trace(self.network.module):
            at = LossAt(self.loss, self._linear(batch), targets)
            self._pull_back(batch, at.gradient)
        for mine, theirs in zip(self._optimizer.param_groups, self._groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})
        self._optimizer.step()
        return at.value

    def outputs(self, batch: Any) -> Tensor:
        """The linear model's outputs [n, C] on a batch, float64 on the CPU."""
        with leave_no_trace(self.network.module):
            return self._linear(to_device(batch, self.network.device)).cpu()

    def _linear(self, batch: Any) -> Tensor:
        direction = {name: p - self._start[name] for name, p in self.parameters.items()}
        f_0, moved, _ = jvp(self.network, batch, self._start, direction)
        return f_0.double() + moved.double()

    def _pull_back(self, batch: Any, gradient: Tensor) -> None:
        """J_0ᵀ∇_f𝓛 into the `.grad` of the linear model's parameters."""
        leaves = {name: self._start[name].detach().clone().requires_grad_() for name in self.parameters}
        f = self.network.outputs(batch, {**self._start, **leaves})
        grads = torch.autograd.grad(f, list(leaves.values()), gradient.to(f), allow_unused=True)
        for name, g in zip(leaves, grads, strict=True):
            self.parameters[name].grad = g

    def _copy(self, optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
        """An optimizer of the same class and settings on the linear model's parameters, and the groups it copies."""
        if optimizer.state:
            raise ValueError("the optimizer has stepped already: make the forecast before training, at θ_0")
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

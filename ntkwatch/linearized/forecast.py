"""What the linearised network would have done: trained beside the run, on its batches, by a copy of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.engines.tangent import jvp
from ntkwatch.guard import leave_no_trace
from ntkwatch.linearized.optimizer_copy import Clip, OptimizerCopy, Rates
from ntkwatch.model import Network, to_device
from ntkwatch.model.batch_statistics import running_statistics
from ntkwatch.model.loss import LossAt, LossFn, loss_of

NO_FORECAST = "the forecast needs every training batch: set monitor.forecast = LinearForecast(...) and step it"
MOVED = (
    "the weights are not those that the optimizer left: something else averaged, swapped or changed them, and the "
    "forecast is of the optimizer's steps alone"
)


@dataclass(frozen=True)
class Stepped:
    """One step of the run's optimizer: the rates it had before and after, and the weights that it left."""

    rates: Rates
    after: Rates
    weights: Tensor


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

    A step costs a forward-mode product, a forward and a backward pass at θ_0: two to three training steps
    (`python -m tests.bench.forecast` prints the ratio); memory is three copies of the parameters and one of the
    optimizer's state. Network and loss are taken in evaluation mode at the BatchNorm
    statistics of the start, so a run with dropout or BatchNorm also differs from its forecast by those:
    `gradient_error` says by how much at the first step. Inside a Trainer, `NTKWatch` does all this where
    `loss_if_lazy` or `forecast_error` is among its diagnostics by name.

    Args:
        model: the module at θ_0, or a Network of it.
        optimizer: the run's own, before its first step; any torch optimizer that `OptimizerCopy` can copy.
        loss: callable (outputs, targets) -> mean loss; None takes the module's `ntk_loss`.
        outputs: callable (model, batch) -> [n, C], where the model's own output is something else.
        targets: callable (batch) -> targets, where they are not the batch's own.
        start: θ_0 and BatchNorm's statistics by name, where the model no longer, or not yet, is at them.
        resumed: `tensors()` of the forecast to go on with, of an optimizer that has stepped since.

    Attributes:
        gradient_error: ‖g_run − g‖/‖g_run‖ of the first step, g the forecast's gradient; None before it, and where the
            run's `.grad` were gone by then.

    Raises:
        ValueError: no loss, or an optimizer that cannot be copied or has stepped already; in `apply`, where the run's
            optimizer is no longer the same.
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
        found, self._targets = loss_of(self.network.module, loss), targets or self.network.targets
        here = {**self.network.parameters, **running_statistics(self.network.module), **(start or {})}
        self._start = {name: tensor.detach().to(self.network.device, copy=True) for name, tensor in here.items()}
        self.parameters = {name: self._start[name].clone() for name in self.network.parameters}
        self._rule = OptimizerCopy(optimizer, self.network.parameters, self.parameters)
        if resumed is None and self._rule.has_stepped:
            raise ValueError("the optimizer has stepped already: make the forecast before training, at θ_0")
        self.gradient_error: float | None = None
        self._steps = 0  # on gradients: what skipped batches make moves nothing
        self._left = self.weights()
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

    def apply(self, stepped: Stepped | None = None, clip: Clip | None = None) -> None:
        """Step on the gradients added since the last one.

        stepped: how the run's optimizer did; None: with the rates of now, to the weights of now.
        clip: what the run did to its gradients' size, on the linear model's parameters in place.
        """
        how, moves = stepped or self.stepped(self.rates()), any(g is not None for g in self.gradients.values())
        with leave_no_trace(self.network.module):
            self._rule.step(how.rates, how.after, clip)
        if self._steps == 0 and moves:
            self._compare_gradients()
        self._steps += moves
        self._left = how.weights
        self.discard()

    def stepped(self, rates: Rates) -> Stepped:
        """Said right after the run's optimizer stepped, with the rates that it had right before."""
        return Stepped(rates, self.rates(), self.weights())

    def discard(self) -> None:
        """Forget the gradients added since the last step: the run's optimizer did not step on its own."""
        for p in self.parameters.values():
            p.grad = None

    def rates(self) -> Rates:
        """Learning rates and every other setting of the run's parameter groups, as they stand."""
        return self._rule.rates()

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """Those added since the last step, by parameter name, None where there is none; to read and to set."""
        return {name: p.grad for name, p in self.parameters.items()}

    @gradients.setter
    def gradients(self, given: Mapping[str, Tensor | None]) -> None:
        """Set the gradients of the next step, by parameter name, each of the shape of its parameter."""
        for name, gradient in given.items():
            self.parameters[name].grad = gradient

    def weights(self) -> Tensor:
        """What tells the run's weights of now from others: sum and norm of each parameter [P, 2], float64."""
        with torch.no_grad():
            return torch.stack([_traits(p.detach()) for p in self.network.parameters.values()]).cpu()

    def lost(self, optimizer: torch.optim.Optimizer | None = None) -> str | None:
        """Why the next step of the run's optimizer (of now) is not the forecast's as well; None where it is."""
        return self._rule.changed(optimizer) or self.moved()

    def moved(self) -> str | None:
        """Said where the run's weights are not where its optimizer's last step left them."""
        return None if torch.allclose(self.weights(), self._left, rtol=0, atol=0, equal_nan=True) else MOVED

    def outputs(self, batch: Any) -> Tensor:
        """The linear model's outputs [n, C] on a batch, float64 on the CPU."""
        with leave_no_trace(self.network.module):
            return self._linear(to_device(batch, self.network.device)).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, as one flat mapping that a resumed forecast is made from."""
        found = {f"theta/{name}": p.detach() for name, p in self.parameters.items()}
        found |= {f"state/{name}": value for name, value in self._rule.tensors().items()}
        error = torch.nan if self.gradient_error is None else self.gradient_error
        return found | {"steps": torch.tensor(self._steps), "gradient_error": torch.tensor(error).double()}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"theta/{name}"])
        self._rule.restore({key.removeprefix("state/"): v for key, v in tensors.items() if key.startswith("state/")})
        self._steps, error = int(tensors["steps"]), float(tensors["gradient_error"])
        self.gradient_error = None if error != error else error

    def _linear(self, batch: Any) -> Tensor:
        direction = {name: p - self._start[name] for name, p in self.parameters.items()}
        f_0, moved, _ = jvp(self.network, batch, self._start, direction)
        return f_0.double() + moved.double()

    def _pull_back(self, batch: Any, gradient: Tensor) -> None:
        """Add J_0ᵀ∇_f𝓛 to the `.grad` of the linear model's parameters, those that the run has not frozen since."""
        trained = [name for name, p in self.network.parameters.items() if p.requires_grad]
        if not trained:
            return
        leaves = {name: self._start[name].detach().clone().requires_grad_() for name in trained}
        f = self.network.outputs(batch, {**self._start, **leaves})
        grads = torch.autograd.grad(f, list(leaves.values()), gradient.to(f), allow_unused=True)
        for name, g in zip(leaves, grads, strict=True):
            p = self.parameters[name]
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def _compare_gradients(self) -> None:
        """At the first step both models are at θ_0: their gradients are one, if loss and mode are the run's."""
        run = {name: p.grad.detach().double() for name, p in self.network.parameters.items() if p.grad is not None}
        if not run:
            return
        mine = {name: self.parameters[name].grad for name in run}
        gone = [g.norm() if (m := mine[name]) is None else (m.double() - g).norm() for name, g in run.items()]
        size = torch.stack([g.norm() for g in run.values()]).norm()
        if size > 0:
            self.gradient_error = float(torch.stack(gone).norm() / size)


def _traits(p: Tensor) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    return torch.stack([p.sum(dtype=dtype), torch.linalg.vector_norm(p, dtype=dtype)]).double()


def at_probe(forecast: LinearForecast | str, network: Network, batch: Any) -> dict[str, Any]:
    """The forecast's outputs on the batch as `f_lazy`, and how its first gradient met the run's as `lazy_start`."""
    if isinstance(forecast, str):
        return {"f_lazy": forecast, "lazy_start": forecast}
    if unfrozen := network.unfrozen():
        reason = f"{unfrozen[0]} trains now and did not at the baseline: the forecast leaves it out"
        return {"f_lazy": reason, "lazy_start": reason}
    missing = "the forecast has not met the gradients of a first step"
    start = forecast.gradient_error
    return {
        "f_lazy": forecast.moved() or forecast.outputs(batch),
        "lazy_start": missing if start is None else start,
    }

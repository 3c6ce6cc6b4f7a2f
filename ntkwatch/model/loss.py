"""The user's loss as a function of the outputs: its value, gradient and curvature on the probes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ntkwatch.metrics.undefined import Undefined

LossFn = Callable[[Tensor, Tensor], Tensor]
COUPLING_TOLERANCE = 1e-5  # of the curvature: above rounding in float32, far below what examples that are coupled have
CHECKED_ROWS = 4  # that tell how a loss meets flat targets
NO_LOSS = "no loss is known: pass loss=, a callable (outputs, targets) -> mean loss, or define ntk_loss on the module"


def loss_of(module: nn.Module, given: LossFn | None) -> LossFn | str:
    """`given`, else the module's own `ntk_loss`, else why there is none: a loss is never guessed."""
    own = getattr(module, "ntk_loss", None)
    return given or (own if callable(own) else NO_LOSS)


@dataclass(frozen=True)
class LossAt:
    """The reduced loss 𝓛 at outputs [n, C] and targets as they come from the batch, in float64 where the loss can.

    What the loss cannot do raises `Undefined` with the reason: it fails, is no scalar, or couples examples.
    """

    function: LossFn
    outputs: Tensor
    targets: Tensor

    @cached_property
    def value(self) -> float:
        """𝓛, the mean that the user's loss returns."""
        with torch.no_grad():
            return float(self.at(self.outputs))

    @cached_property
    def gradient(self) -> Tensor:
        """∂𝓛/∂f [n, C], 1/n included; float64 on the CPU."""
        return self._gradient(self._leaf()).detach().cpu()

    @cached_property
    def hessian(self) -> Tensor:
        """∂²𝓛/∂f² [n, C, C], an example's own block each, 1/n included; float64 on the CPU."""
        f = self._leaf()
        gradient = self._gradient(f, create_graph=True)
        blocks = torch.zeros(*f.shape, f.shape[1], dtype=f.dtype, device=f.device)
        if gradient.requires_grad:  # a loss linear in the outputs has no second derivative
            columns = [torch.autograd.grad(g.sum(), f, retain_graph=True)[0] for g in gradient.T]
            blocks = torch.stack(columns, dim=1)
            self._check_separate(f, gradient, blocks)
        if not bool(torch.isfinite(blocks).all()):
            raise Undefined("the loss's Hessian is not finite")
        return ((blocks + blocks.mT) / 2).detach().cpu()

    def at(self, outputs: Tensor) -> Tensor:
        """𝓛 of other outputs [n, C] for the same targets, 0-d."""
        return self._called(outputs, self._column(self.targets) if self._takes_column else self.targets)

    @cached_property
    def _takes_column(self) -> bool:
        """Whether one output [n, 1] is to meet flat targets as [n, 1]: where the loss then is that of its rows.

        Met the other way round both broadcast to [n, n], silently in most losses.
        """
        if self.targets.ndim != 1 or self.outputs.shape[1] != 1:
            return False
        column, flat = (self._gap(shape) for shape in (self._column, lambda y: y))
        return column <= flat

    def _gap(self, shape: Callable[[Tensor], Tensor]) -> float:
        """How far the loss of some rows is from the mean, or the sum, of their own; infinite where it fails."""
        f, y = self.outputs[:CHECKED_ROWS].detach(), shape(self.targets[:CHECKED_ROWS])
        if len(f) == 0:
            return math.inf
        try:
            with torch.no_grad():
                together = self._called(f, y)
                apart = torch.stack([self._called(f[i : i + 1], y[i : i + 1]) for i in range(len(f))])
        except Undefined:
            return math.inf
        return float(torch.stack([(together - apart.mean()).abs(), (together - apart.sum()).abs()]).min())

    @staticmethod
    def _column(y: Tensor) -> Tensor:
        return y[:, None]

    def _called(self, outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            loss = self._evaluated(outputs, targets)
        except Exception as error:
            loss = self._in_float32(outputs, targets, error)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise Undefined("the loss is not one number: it must return a mean over the examples")
        return loss.reshape(()).to(outputs.dtype)

    def _evaluated(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.device)
        targets = targets.to(outputs.dtype) if targets.is_floating_point() else targets
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*target size.*different.*")
            return self.function(outputs, targets)

    def _in_float32(self, outputs: Tensor, targets: Tensor, failed: Exception) -> Tensor:
        """For a loss that holds float32 tensors of its own, class weights say, which float64 outputs do not go with."""
        try:
            return self._evaluated(outputs.float(), targets)
        except Exception:
            raise Undefined(f"the loss failed on the probes ({type(failed).__name__}: {failed})") from failed

    def _leaf(self) -> Tensor:
        return self.outputs.detach().double().requires_grad_()

    def _gradient(self, f: Tensor, create_graph: bool = False) -> Tensor:
        with torch.enable_grad():
            loss = self.at(f)
            if not loss.requires_grad:
                raise Undefined("the loss does not depend on the outputs")
            found = torch.autograd.grad(loss, f, create_graph=create_graph, allow_unused=True)[0]
        if found is None:
            raise Undefined("the loss does not depend on the outputs")
        return found

    def _check_separate(self, f: Tensor, gradient: Tensor, blocks: Tensor) -> None:
        """A mean over examples has no curvature between two of them: one random product tells."""
        w = torch.randn(f.shape, dtype=f.dtype, generator=torch.Generator().manual_seed(0), device="cpu").to(f.device)
        product = torch.autograd.grad((gradient * w).sum(), f, retain_graph=True)[0]
        own = torch.einsum("ncd,nc->nd", blocks, w)
        if (product - own).norm() > COUPLING_TOLERANCE * own.norm():
            raise Undefined("the loss couples examples: its curvature is not one block for each")

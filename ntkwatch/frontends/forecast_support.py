"""Which fits of a Trainer make the linear forecast's steps, and what they do to gradients on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")  # one process, or gradients averaged over several
OWN = ("configure_gradient_clipping", "clip_gradients", "optimizer_zero_grad")  # what a module may do in its own way


def why_not(trainer: Any, module: Any) -> str | None:
    """Why the batches of this fit do not make a linear model's steps, None where they do."""
    if (reason := _strategy(trainer.strategy)) is not None:
        return reason
    if not module.automatic_optimization:
        return "the forecast cannot tell which batches make a step under manual optimization"
    if len(trainer.optimizers) != 1:
        return f"the forecast follows one optimizer and this run has {len(trainer.optimizers)}"
    return _own_ways(trainer, module)


def _strategy(strategy: Any) -> str | None:
    """Told by name: a class of the user's counts as what it is made from."""
    kinds = [kind.__name__ for kind in type(strategy).__mro__ if kind.__module__.partition(".")[0] in LIGHTNING]
    if not kinds or kinds[0] not in STRATEGIES:
        return f"the forecast follows one device or DDP and this run's strategy is {type(strategy).__name__}"
    if getattr(strategy, "_ddp_comm_hook", None) is not None:
        return "the forecast cannot follow a DDP communication hook: it changes gradients on their way"
    if getattr(strategy, "_model_averaging_period", None) is not None:
        return "the forecast cannot follow a strategy that averages models"
    return None


def _own_ways(trainer: Any, module: Any) -> str | None:
    for name in OWN:
        owners = [kind.__name__ for kind in type(module).__mro__ if name in vars(kind)]
        if owners[0] == "_Scaled" and trainer.gradient_clip_val:
            return "the forecast cannot follow the clipping of an output-scale twin"
        user = next(owner for owner in owners if owner != "_Scaled")  # which clips only where the trainer does
        if user != "LightningModule":
            return f"the forecast cannot follow {user}.{name}"
    return None


def clipping(trainer: Any) -> Callable[[Sequence[Tensor]], None] | None:
    """The trainer's own clipping of gradients as a function of parameters, None where it clips nothing."""
    value = trainer.gradient_clip_val
    if not value or value < 0:
        return None
    by_value = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value"
    clip: Any = torch.nn.utils.clip_grad_value_ if by_value else torch.nn.utils.clip_grad_norm_
    return lambda parameters: clip(parameters, value)

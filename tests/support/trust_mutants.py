"""Negative controls: nine naive probes that change training, and a careful one that does not.

Each is what somebody would write in a first monitor. The harness must see every one of them; were one not seen, "0
differ" about the real monitor would say nothing. `Mutant.job` and `.hook` name a cell where the trained weights differ.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.trust_configs import FEATURES, TASKS, Job, Net
from tests.support.trust_harness import fixed_probes


def inputs(module: Any) -> Tensor:
    return fixed_probes(module)[0]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, every sub-module's own flag put back."""
    flags = {sub: sub.training for sub in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for sub, flag in flags.items():
            sub.training = flag


def train_mode_forward(module: Any, call: int) -> None:
    """Moves BatchNorm's statistics and draws Dropout's masks."""
    with torch.no_grad():
        module.net(inputs(module))


def backward(module: Any, call: int) -> None:
    """Adds the probe's gradients to those that training is accumulating."""
    with evaluating(module), torch.inference_mode(False), torch.enable_grad():
        module.net(inputs(module)).sum().backward()


def next_iter_loader(module: Any, call: int) -> None:
    """A new iterator draws a base seed, and its samples draw the augmentation's noise."""
    with evaluating(module), torch.no_grad():
        x, _ = next(iter(module.trainer.train_dataloader))
        module.net(x.to(next(module.parameters()).dtype))


def global_rng(module: Any, call: int) -> None:
    """Chooses probes with the run's own generator."""
    with evaluating(module), torch.no_grad():
        module.net(inputs(module)[torch.randperm(4)[:3]])


def eval_train_toggle(module: Any, call: int) -> None:
    """`train()` wakes a sub-module that was frozen in evaluation mode."""
    module.eval()
    with torch.no_grad():
        module.net(inputs(module))
    module.train()


def template(module: Any, call: int) -> None:
    """A fresh module for functional_call: its initialisation draws from the global generator."""
    fresh = type(module)(kind=module.kind)
    with evaluating(fresh), torch.no_grad():
        fresh.net.float()(inputs(module).float())


def hook_that_returns(module: Any, call: int) -> None:
    """`dict.setdefault` in a hook returns what it stores, which replaces the layer's output by one without a graph."""
    captured: dict[str, Tensor] = {}
    module.net.stem.register_forward_hook(
        lambda layer, args, out: captured.setdefault(f"{len(captured)}", out.detach())
    )


def inference_tensors(module: Any, call: int) -> None:
    """A table that the model builds on its first forward becomes an inference tensor, which no backward may use."""
    with evaluating(module), torch.inference_mode():
        module.net(inputs(module))


def deepcopy(module: Any, call: int) -> None:
    """The copy keeps closures, so a hook of the copy writes into the original."""
    twin = copy.deepcopy(module)
    twin.eval()
    with torch.no_grad():
        twin.net(inputs(module))


def careful(module: Any, call: int) -> None:
    """Harmless by hand, for this net: the harness must let it pass in every cell."""
    net, kept = module.net, [(sub, dict(sub.__dict__)) for sub in module.modules()]
    values = {name: p.detach().clone() for name, p in [*net.named_parameters(), *net.named_buffers()]}
    try:
        with evaluating(module), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.func.functional_call(net, values, (inputs(module),))
    finally:
        for sub, attributes in kept:
            sub.__dict__.update(attributes)


class Tracked(Net):
    """A net whose own hook, a closure, keeps a running mean of its inputs that enters the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(FEATURES))
        original = self  # deepcopy does not copy a nested function: the copy's hook writes here

        def track(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            original.seen.mul_(0.9).add_(0.1 * args[0].detach().mean(0))

        self.register_forward_pre_hook(track)

    def forward(self, x: Tensor) -> Tensor:
        self.features = None
        out = super().forward(x - self.seen)
        self.features = None
        return out


TRACKED = Job("closure hook", lambda import_name: TASKS[import_name](net=Tracked()))


@dataclass(frozen=True)
class Mutant:
    """A naive probe, and the job and hook where it does harm."""

    name: str
    probe: Callable[[Any, int], None]
    job: str
    hook: str


MUTANTS = [
    Mutant("train-mode forward", train_mode_forward, "plain", "on_train_batch_end"),
    Mutant(".backward()", backward, "accumulation 3", "on_train_batch_end"),
    Mutant("next(iter(loader))", next_iter_loader, "plain", "on_train_batch_end"),
    Mutant("global RNG", global_rng, "plain", "on_train_batch_end"),
    Mutant("eval()/train() toggle", eval_train_toggle, "frozen BatchNorm in eval", "on_train_batch_end"),
    Mutant("template from global RNG", template, "plain", "on_train_batch_end"),
    Mutant("hook that returns a value", hook_that_returns, "plain", "on_train_batch_end"),
    Mutant("inference tensors", inference_tensors, "plain", "on_train_batch_start"),
    Mutant("deepcopy", deepcopy, "closure hook", "on_train_batch_end"),
]

"""Explanations of refused models: which module couples examples, which attribute keeps state, and the remedy."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ntkwatch.engines.kept_state import Reset, resets, written
from ntkwatch.model import Network, batch_size, inputs_of, is_per_example, leaves
from ntkwatch.model.batch import as_batch
from ntkwatch.model.batch_reading import at, name_of


def coupling_module(network: Network) -> str:
    """The module that most likely couples examples, as a phrase; "" if none is known."""
    for name, module in network.module.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if norm and "Instance" not in type(module).__name__ and (module.training or not module.track_running_stats):
            return f" (module {name or 'itself'}, {type(module).__name__}, normalises by the batch's own statistics)"
    return ""


def coupled(network: Network, x: Any) -> str:
    """The cause and the remedy, to follow "an example's output depends on the other examples of its batch"."""
    by = coupling_module(network)
    end = ": the per-example kernel does not exist"
    return f"{by}{end}" if by else f"{_through(network, x)}{end}; {_by_number(network, x)}"


def describe_partial_batches(network: Network, x: Any, error: Exception) -> str:
    """The message for a model that runs on the whole batch but fails on part of it."""
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return (
        f"the model runs on these {batch_size(inputs_of(x))} probes together but not on some of them ({said}): where "
        f"batches of one size alone run, examples cannot be told apart{_through(network, x)}; "
        f"{_by_number(network, x)}"
    )


def _by_number(network: Network, x: Any) -> str:
    """The remedy if rows are not independent examples: pass their numbers as probes."""
    n = batch_size(inputs_of(x))
    call = f"{network.code(x)}[rows]"
    whose = "outputs and batch are" if call.startswith("outputs") else "batch is"
    lead = _lead(network, x)
    return (
        f"each row of {lead} is taken as one example: if rows are nodes of one graph or parts of one whole, pass "
        f"their numbers as probes, torch.arange({n}), with outputs=lambda model, rows: {call}, where {whose} what you "
        "pass now"
    )


def _lead(network: Network, x: Any) -> str:
    """The name of the input whose rows are the examples."""
    reading, value = network.reading(x), as_batch(x).value
    names = [*network.call.signature.required, "the probes"]
    for place in reading.places:
        if is_per_example(at(value, place), batch_size(inputs_of(x))):
            return name_of(value, place) if place else names[0]
    return "the probes"


def _through(network: Network, x: Any) -> str:
    """The n × n tensors that may relate the rows of a batch to each other, by name."""
    batch = as_batch(x)
    n = batch.n
    square = [name for name, t in network.buffers.items() if t.ndim >= 2 and t.shape[0] == t.shape[1] == n]
    shared = [leaf for leaf, own in zip(leaves(batch), batch.rows, strict=True) if isinstance(leaf, Tensor) and not own]
    square += [f"the probes' own {list(leaf.shape)}" for leaf in shared if leaf.ndim >= 2]
    return f", perhaps through {', '.join(square[:2])}" if square else ""


def describe_randomness(
    network: Network, x: Any, outputs: Callable[[slice], Tensor], whole: Tensor, limit: Tensor
) -> str:
    """The message if two forward passes on the same probes differ: random numbers, or state kept between calls."""
    n = len(whole)

    def again(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  the surrounding guard restores it
        return outputs(slice(0, n))

    names = written(network.module, again)
    if not names or not bool(((again(0) - again(0)).abs() > limit).any()):
        return "two forward passes on the same probes differ: the model draws random numbers in eval mode"
    kept = ", ".join(f"{prefix}.{name}" if prefix else name for prefix, name in names)
    said = f"two forward passes on the same probes differ: the model keeps state between calls ({kept})"
    call = network.code(x)
    code = resets(network.module, names, lambda way: _repeats(outputs, n, limit, way))
    if code is None:
        return f"{said}: in outputs=, set it to its value at the start of a sequence before calling the model"
    own = ", where outputs is your present function" if call.startswith("outputs") else ""
    return f"{said}: reset it before each call, outputs=lambda model, batch: ({code}, {call})[-1]{own}"


def _repeats(outputs: Callable[[slice], Tensor], n: int, limit: Tensor, way: Sequence[Reset]) -> bool:
    """Whether outputs agree together, again and each example alone, with attributes reset before each pass."""
    found = []
    for part in (slice(0, n), slice(0, n), *(slice(i, i + 1) for i in range(n))):
        try:
            for reset in way:
                reset.do()
            found.append((part, outputs(part)))
        except Exception:
            return False
    whole = found[0][1]
    return all(
        one.shape == whole[part].shape and not bool(((one - whole[part]).abs() > limit).any()) for part, one in found
    )


def nested(network: Network, forward: Callable[[], object]) -> str:
    """The message for nested tensors: the first module of `forward` that takes or returns one, and the remedy."""
    seen: list[str] = []
    names = {id(module): name for name, module in network.module.named_modules()}

    def look(module: nn.Module, args: Any, result: Any) -> None:
        if any(isinstance(t, Tensor) and t.is_nested for t in tree_leaves((args, result))):
            seen.append(f"module {names[id(module)] or 'itself'} ({type(module).__name__})")

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in network.module.modules():
            hooks.enter_context(module.register_forward_hook(look))
        forward()
    return (
        f"{seen[0] if seen else 'the model'} computes on nested tensors, whose gradients cannot be read by example: "
        "pad them (torch.nested.to_padded_tensor) and mask"
    )

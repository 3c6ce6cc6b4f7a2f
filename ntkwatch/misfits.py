"""Probes that are no batch, or do not fit a model: which module they reached, what it takes and got, what to do.

torch names neither: "mat1 and mat2 must have the same dtype" is all that it says of float64 probes. The module and its
input are read from the error's own traceback, so that nothing is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of, is_per_example, leaves
from ntkwatch.parts import as_read, other_parts
from ntkwatch.plain import unwrap

GIVE = "give probes in the form that the model's own loader gives, or outputs=lambda model, batch: … that converts them"
TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


EMPTY = "the probes are empty: a batch must hold at least one example"


def check_batch(x: Any) -> None:
    """Raises ValueError for what is no batch of numbers whose examples can be taken (see `check_form`), or has none."""
    check_form(x)
    if batch_size(inputs_of(x)) == 0:
        raise ValueError(EMPTY)


def check_form(x: Any) -> None:
    """Raises ValueError for a batch that is none: a loader, a dataset, no tensor, meta, sparse, nested."""
    if not leaves(x):
        raise ValueError(EMPTY)
    inputs = [leaf for leaf in leaves(inputs_of(x)) if isinstance(leaf, Tensor)]
    if not inputs and (giver := giver_of_batches(*leaves(x)[:1])) is not None:
        got, (kind, how) = type(leaves(x)[0]).__name__, giver
        raise ValueError(f"a batch must hold a tensor [n, ...], got {got} ({kind}): take a batch of it, {how}")
    if any(leaf.is_meta for leaf in inputs):
        raise ValueError("the probes are on the meta device, which holds no numbers: give them on the model's own")
    if any(leaf.is_nested for leaf in inputs):
        raise ValueError(
            "the probes are a nested tensor, whose examples cannot be taken in blocks: pad them, "
            "torch.nested.to_padded_tensor(probes, 0.0), and give the model their lengths or a mask beside them"
        )
    if any(leaf.is_inference() for leaf in inputs):
        raise ValueError(
            "the probes were made under torch.inference_mode, so that nothing can be derived from them: give "
            "probes.clone(), taken outside of it"
        )
    n = batch_size(inputs_of(x))
    for leaf in inputs:
        if leaf.layout is not torch.strided and is_per_example(leaf, n):
            raise ValueError(
                f"the probes must be dense, since examples are taken one by one, got {_shape(leaf)} in the layout "
                f"{_name(leaf.layout)}: give probes.to_dense(); where the model itself takes sparse inputs, have "
                "outputs=lambda model, batch: … make them sparse"
            )


def giver_of_batches(x: Any) -> tuple[str, str] | None:
    """Where x is no batch but gives batches or examples: what it is, and how to take a batch of it. Else None."""
    if hasattr(x, "__next__"):
        return "iterator", "next(iterator)"
    if hasattr(x, "dataset") and hasattr(x, "__iter__"):
        return "loader", "next(iter(loader))"
    gives = (hasattr(x, "__getitem__") or hasattr(x, "__iter__")) and not hasattr(x, "to")  # a batch of graphs
    if gives and not hasattr(x, "shape") and not isinstance(x, str | bytes | list | tuple | set):
        return "dataset", "next(iter(DataLoader(dataset, batch_size=64)))"
    return None


def misfit(model: nn.Module, batch: Any, error: BaseException) -> str | None:
    """Why the model failed on the batch, where a module was given a tensor that it cannot take; None for anything else.

    What, got, do this, in one sentence; `error` is what the model raised, with its traceback.
    """
    names = {id(module): name for name, module in unwrap(model).named_modules()}
    reached = [(module, x) for module, x in _calls(error) if id(module) in names]
    if not reached:
        return None
    module, x = reached[-1]
    probes = [leaf for leaf in leaves(inputs_of(batch)) if any(_views(part, leaf) for part in leaves(x))]
    wrong = _wrong(module, x, _whole(x, probes)) if isinstance(x, Tensor) else _no_tensor(module, x)
    if wrong is None:
        return None
    takes, got, remedy = wrong
    place = f"module {names[id(module)]} ({type(module).__name__})" if names[id(module)] else type(module).__name__
    if not probes:
        return (
            f"{place} takes {takes} and gets {got} from the layers before it: the model does not run on these probes, "
            f"{_form(batch)}; {GIVE}"
        )
    first = f"{place}, the first to get them, takes {takes}, got {got}"
    return f"the probes do not fit the model: {first}: {remedy}; or {GIVE}"


def why_not(network: Network, batch: Any, error: BaseException) -> str | None:
    """Why the model failed on the batch and what to do, in one sentence; None where that is not the batch's doing."""
    why, code = misfit(network.module, batch, error), other_parts(network, batch)
    if code is None:
        return why
    said = next(iter(str(error).splitlines()), "")
    taken = f"the model does not run on what was taken as its inputs, {as_read(network, batch)}"
    return f"{why or f'{taken} ({type(error).__name__}: {said})'}; it does with {code}"


@contextlib.contextmanager
def explained(network: Network, batch: Any) -> Iterator[None]:
    """Whatever is raised inside because the batch does not fit the model becomes a ValueError that says so."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:  # torch raises assertions among others
        why = why_not(network, batch, error)
        if why is None:
            raise
        raise ValueError(why) from error


def _calls(error: BaseException) -> Iterator[tuple[nn.Module, Any]]:
    """Modules that were running when the error was raised, outermost first, and the first tensor given to each.

    Where one was given no tensor: the first of what it was given.
    """
    at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_name == "_call_impl":
            held = at.tb_frame.f_locals
            given = [*held.get("args", ()), *held.get("kwargs", {}).values()]
            x = next((each for each in given if isinstance(each, Tensor)), given[0] if given else None)
            if isinstance(held.get("self"), nn.Module) and given:
                yield held["self"], x
        at = at.tb_next


def _whole(x: Tensor, probes: list[Tensor]) -> Tensor:
    """The probes themselves, where a module was given a few of them as they are."""
    return next((leaf for leaf in probes if leaf.ndim == x.ndim and leaf.shape[1:] == x.shape[1:]), x)


def _no_tensor(module: nn.Module, x: Any) -> tuple[str, str, str] | None:
    """(what the module takes, what it got, the remedy) where a layer of torch's with weights got a dict, a list, …"""
    weighted = type(module).__module__.startswith("torch.nn.") and any(True for _ in module.parameters(recurse=False))
    if not weighted or hasattr(x, "_fields"):  # a PackedSequence is what recurrent layers take
        return None
    if isinstance(x, Mapping):
        names = [str(key) for key in x]
        return (
            "a tensor",
            f"a {type(x).__name__} of {', '.join(names[:6])}",
            f"give the tensor alone, probes[{names[0]!r}]",
        )
    if isinstance(x, list | tuple):
        return "a tensor", f"a {type(x).__name__} of {len(x)}", "give the tensor alone, probes[0]"
    if dataclasses.is_dataclass(x) and (fields := [field.name for field in dataclasses.fields(x)]):
        got = f"a {type(x).__name__} of {', '.join(fields[:6])}"
        return "a tensor", got, f"pass outputs=lambda model, batch: model(batch.{fields[0]})"
    return "a tensor", "None" if x is None else type(x).__name__, "give a tensor"


def _views(x: Any, leaf: Any) -> bool:
    """Whether a tensor is a probe's own, some of its examples perhaps, or in another shape."""
    if (
        not isinstance(x, Tensor)
        or not isinstance(leaf, Tensor)
        or x.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    ):
        return False
    return x.ndim == 0 or leaf.ndim == 0 or x.numel() * len(leaf) == leaf.numel() * len(x)  # no part of an example


def _wrong(module: nn.Module, x: Tensor, whole: Tensor) -> tuple[str, str, str] | None:
    """(what the module takes, what it got, the remedy), None where the input fits; it got x, a few rows of whole."""
    if not type(module).__module__.startswith("torch.nn."):
        return None  # what somebody's own module takes is not known
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _wrong_index(module.num_embeddings, whole)
    weight = next((p for p in module.parameters(recurse=False) if p.is_floating_point()), None)
    if weight is not None and x.dtype != weight.dtype:
        remedy = f"convert them, probes.to({weight.dtype})"
        remedy += f", or the model, model.to({x.dtype})" if x.dtype in TRAINABLE else ""
        return _name(weight.dtype), _name(x.dtype), remedy
    if isinstance(module, CONVOLUTIONS):
        return _wrong_channels(module, whole)
    width = _width(module)
    if width is None or (x.ndim and x.shape[-1] == width):
        return None
    remedy = "look for a transform that they have not been through"
    if x.ndim > 2 and math.prod(x.shape[1:]) == width:
        remedy = "flatten them, probes.flatten(1)"
    elif whole.ndim == 1 and (width == 1 or len(whole) == width):  # numbers without a column, or a single example
        remedy = f"give each example a row, probes.unsqueeze({int(width == 1)})"
    return f"a last dimension of {width}", _shape(whole), remedy


def _wrong_index(rows: int, x: Tensor) -> tuple[str, str, str] | None:
    takes = f"whole numbers from 0 to {rows - 1}"
    if x.dtype not in (torch.int64, torch.int32):
        return takes, _name(x.dtype), "convert them, probes.long()"
    low, high = (int(end) for end in x.aminmax()) if x.numel() else (0, 0)
    if low < 0 or high >= rows:
        return takes, f"{low} to {high}", "take the tokenizer that the model was built for"
    return None


def _wrong_channels(module: Any, x: Tensor) -> tuple[str, str, str] | None:
    """Of a convolution: [n, channels, …], or [channels, …] of a single example."""
    spatial, channels = len(module.kernel_size), module.in_channels
    takes = f"[n, {channels}, {', '.join(['size'] * spatial)}]"
    if x.ndim == spatial + 2 and x.shape[1] == channels:
        return None
    remedy = "look for a transform that they have not been through"
    if x.ndim == spatial + 2 and x.shape[-1] == channels:
        remedy = (
            f"the channels come first, probes.permute(0, {spatial + 1}, {', '.join(map(str, range(1, spatial + 1)))})"
        )
    elif x.ndim == spatial + 1 and channels == 1:
        remedy = "give them a channel, probes.unsqueeze(1)"
    return takes, _shape(x), remedy


def _width(module: nn.Module) -> int | None:
    """The last dimension that a module takes."""
    for kind, name in ((nn.Linear, "in_features"), (nn.RNNBase, "input_size"), (nn.MultiheadAttention, "embed_dim")):
        if isinstance(module, kind):
            return int(getattr(module, name))
    return int(module.normalized_shape[-1]) if isinstance(module, nn.LayerNorm) else None


def _name(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _form(batch: Any) -> str:
    inputs = inputs_of(batch)
    named = inputs.items() if isinstance(inputs, Mapping) else [("", leaf) for leaf in leaves(inputs)]
    return ", ".join(f"{k} {_name(x.dtype)} {_shape(x)}".strip() for k, x in named if isinstance(x, Tensor))

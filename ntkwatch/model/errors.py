"""Probes that are no batch, or do not fit a model: which module they reached, what it takes and got, what to do.

torch names neither: "mat1 and mat2 must have the same dtype" is all that it says of float64 probes. The module and its
input are read from the error's own traceback, so that nothing is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ntkwatch.guard import leave_no_trace
from ntkwatch.model.alternatives import alternative_call, describe_reading
from ntkwatch.model.batch import batch_size, inputs_of, is_per_example, leaves, raw_of
from ntkwatch.model.batch_reading import as_python, at, places_of_tensors
from ntkwatch.model.calling import Caller
from ntkwatch.model.module import Network
from ntkwatch.model.output import UnsupportedModel
from ntkwatch.model.wrappers import unwrap

CONVERT_ADVICE = "give probes in the form that the model's own loader gives, or convert them in outputs="
TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


EMPTY_PROBES = "the probes are empty: a batch must hold at least one example"


def check_batch(x: Any) -> None:
    """Raises ValueError for what is no batch of numbers whose examples can be taken (see `check_form`), or has none."""
    check_form(x)
    if batch_size(inputs_of(x)) == 0:
        raise ValueError(EMPTY_PROBES)


def check_form(x: Any) -> None:
    """Raises ValueError for a batch that is none: a loader, a dataset, no tensor, meta, sparse, nested."""
    if not leaves(x):
        raise ValueError(EMPTY_PROBES)
    inputs = [leaf for leaf in leaves(inputs_of(x)) if isinstance(leaf, Tensor)]
    if not inputs and (giver := batch_source(*leaves(x)[:1])) is not None:
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
                f"{_short_name(leaf.layout)}: give probes.to_dense(); where the model itself takes sparse inputs, have "
                "outputs=lambda model, batch: … make them sparse"
            )


def batch_source(x: Any) -> tuple[str, str] | None:
    """Where x is no batch but gives batches or examples: what it is, and how to take a batch of it. Else None."""
    if hasattr(x, "__next__"):
        return "iterator", "next(iterator)"
    if hasattr(x, "dataset") and hasattr(x, "__iter__"):
        return "loader", "next(iter(loader))"
    gives = (hasattr(x, "__getitem__") or hasattr(x, "__iter__")) and not hasattr(x, "to")  # a batch of graphs
    if gives and not hasattr(x, "shape") and not isinstance(x, str | bytes | list | tuple | set):
        return "dataset", "next(iter(DataLoader(dataset, batch_size=64)))"
    return None


def describe_mismatch(model: nn.Module, batch: Any, error: BaseException, tried: bool = False) -> str | None:
    """Why the model failed on the batch, where a module was given a tensor that it cannot take; None for anything else.

    What, got, do this, in one sentence; `error` is what the model raised, with its traceback. tried: what does not run
    is not said, since the tensor may be what it was not taken for: a label, a length.
    """
    names = {id(module): name for name, module in unwrap(model).named_modules()}
    reached = [(module, x) for module, x in _running_modules(error) if id(module) in names]
    if not reached:
        return None
    module, x = reached[-1]
    probes = [leaf for leaf in leaves(inputs_of(batch)) if any(_is_view_of(part, leaf) for part in leaves(x))]
    wrong = _mismatch(module, x, _full_probe(x, probes)) if isinstance(x, Tensor) else _non_tensor_mismatch(module, x)
    if wrong is None:
        return None
    place = f"module {names[id(module)]} ({type(module).__name__})" if names[id(module)] else type(module).__name__
    if not probes:
        return (
            f"{place} takes {wrong.takes} and gets {wrong.got} from the layers before it: the model does not run on "
            f"these probes, {_describe_batch(batch)}; {CONVERT_ADVICE}"
        )
    first = f"{place}, the first to get them, takes {wrong.takes}, got {wrong.got}"
    return f"the probes do not fit the model: {first}: {_remedy(unwrap(model), batch, probes[0], wrong, tried)}"


class Mismatch(NamedTuple):
    """What a module takes, what it got, and what to do: in words, as code of {x}, the probes; and what else."""

    takes: str
    got: str
    words: str
    code: str = ""
    or_else: str = ""
    alone: bool = False  # what is given then is no batch of as many examples, or another kind of thing


def _remedy(model: nn.Module, batch: Any, probe: Tensor, wrong: Mismatch, tried: bool) -> str:
    """The remedy on these probes, and as outputs= where that does it as well."""
    raw = raw_of(batch)
    if not wrong.code:
        return f"{wrong.words}; or {CONVERT_ADVICE}"
    reading = Caller(model).reading(raw)
    where = next((place for place in places_of_tensors(raw) if at(raw, place) is probe), ())
    if wrong.alone and len(reading.places) == 1:  # the layer got what holds the probe
        where = reading.places[0]
    said = f"{wrong.words}, {wrong.code.format(x=as_python(where, 'probes'))}{wrong.or_else}"
    if wrong.alone or where not in reading.places:
        return f"{said}; or {CONVERT_ADVICE}"
    call = reading.code(lambda part: wrong.code.format(x=as_python(part)) if part == where else as_python(part))
    if tried and not _runs(model, raw, call):
        return CONVERT_ADVICE
    return f"{said}; or pass outputs=lambda model, batch: {call}"


def _runs(model: nn.Module, batch: Any, call: str) -> bool:
    """Whether code that we wrote runs on the batch."""
    try:
        with leave_no_trace(model), torch.no_grad():
            eval(call, {"torch": torch, "model": model, "batch": batch})
    except Exception:
        return False
    return True


def explain_failure(network: Network, batch: Any, error: BaseException) -> str | None:
    """Why the model failed on the batch and what to do, in one sentence; None where that is not the batch's doing."""
    code = alternative_call(network, batch)
    why = describe_mismatch(network.module, batch, error, tried=code is not None)
    if code is None:
        return why
    said = next(iter(str(error).splitlines()), "")
    taken = f"the model does not run on what was taken as its inputs, {describe_reading(network, batch)}"
    return f"{why or f'{taken} ({type(error).__name__}: {said})'}; it does with {code}"


@contextlib.contextmanager
def explained(network: Network, batch: Any) -> Iterator[None]:
    """Whatever is raised inside because the batch does not fit the model becomes a ValueError that says so."""
    try:
        yield
    except UnsupportedModel:
        raise
    except Exception as error:  # torch raises assertions among others
        why = explain_failure(network, batch, error)
        if why is None:
            raise
        raise ValueError(why) from error


def _running_modules(error: BaseException) -> Iterator[tuple[nn.Module, Any]]:
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


def _full_probe(x: Tensor, probes: list[Tensor]) -> Tensor:
    """The probes themselves, where a module was given a few of them as they are."""
    return next((leaf for leaf in probes if leaf.ndim == x.ndim and leaf.shape[1:] == x.shape[1:]), x)


def _non_tensor_mismatch(module: nn.Module, x: Any) -> Mismatch | None:
    """Where a layer of torch's with weights got a dict, a list, …"""
    weighted = type(module).__module__.startswith("torch.nn.") and any(True for _ in module.parameters(recurse=False))
    if not weighted or hasattr(x, "_fields"):  # a PackedSequence is what recurrent layers take
        return None
    alone = "give the tensor alone"
    if isinstance(x, Mapping):
        names = [str(key) for key in x]
        got = f"a {type(x).__name__} of {', '.join(names[:6])}"
        return Mismatch("a tensor", got, alone, f"{{x}}[{names[0]!r}]", alone=True)
    if isinstance(x, list | tuple):
        return Mismatch("a tensor", f"a {type(x).__name__} of {len(x)}", alone, "{x}[0]", alone=True)
    if dataclasses.is_dataclass(x) and (fields := [field.name for field in dataclasses.fields(x)]):
        got = f"a {type(x).__name__} of {', '.join(fields[:6])}"
        return Mismatch("a tensor", got, f"pass outputs=lambda model, batch: model(batch.{fields[0]})")
    return Mismatch("a tensor", "None" if x is None else type(x).__name__, "give a tensor")


def _is_view_of(x: Any, leaf: Any) -> bool:
    """Whether a tensor is a probe's own, some of its examples perhaps, or in another shape."""
    if (
        not isinstance(x, Tensor)
        or not isinstance(leaf, Tensor)
        or x.untyped_storage().data_ptr() != leaf.untyped_storage().data_ptr()
    ):
        return False
    return x.ndim == 0 or leaf.ndim == 0 or x.numel() * len(leaf) == leaf.numel() * len(x)  # no part of an example


CHECK_TRANSFORMS = "look for a transform that they have not been through"


def _mismatch(module: nn.Module, x: Tensor, whole: Tensor) -> Mismatch | None:
    """None where the input fits; the module got x, a few rows of whole."""
    if not type(module).__module__.startswith("torch.nn."):
        return None  # what somebody's own module takes is not known
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _index_mismatch(module.num_embeddings, whole)
    weight = next((p for p in module.parameters(recurse=False) if p.is_floating_point()), None)
    if weight is not None and x.dtype != weight.dtype:
        other = f", or the model, model.to({x.dtype})" if x.dtype in TRAINABLE else ""
        return Mismatch(
            _short_name(weight.dtype), _short_name(x.dtype), "convert them", f"{{x}}.to({weight.dtype})", other
        )
    if isinstance(module, CONVOLUTIONS):
        return _channel_mismatch(module, whole)
    width = _input_width(module)
    if width is None or (x.ndim and x.shape[-1] == width):
        return None
    takes, got = f"a last dimension of {width}", _shape(whole)
    if x.ndim > 2 and math.prod(x.shape[1:]) == width:
        return Mismatch(takes, got, "flatten them", "{x}.flatten(1)")
    if whole.ndim == 1 and (width == 1 or len(whole) == width):  # numbers without a column, or a single example
        row = int(width == 1)
        return Mismatch(takes, got, "give each example a row", f"{{x}}.unsqueeze({row})", alone=row == 0)
    return Mismatch(takes, got, CHECK_TRANSFORMS)


def _index_mismatch(rows: int, x: Tensor) -> Mismatch | None:
    takes = f"whole numbers from 0 to {rows - 1}"
    if x.dtype not in (torch.int64, torch.int32):
        return Mismatch(takes, _short_name(x.dtype), "convert them", "{x}.long()")
    low, high = (int(end) for end in x.aminmax()) if x.numel() else (0, 0)
    if low < 0 or high >= rows:
        return Mismatch(takes, f"{low} to {high}", "take the tokenizer that the model was built for")
    return None


def _channel_mismatch(module: Any, x: Tensor) -> Mismatch | None:
    """Of a convolution: [n, channels, …], or [channels, …] of a single example."""
    spatial, channels = len(module.kernel_size), module.in_channels
    takes = f"[n, {channels}, {', '.join(['size'] * spatial)}]"
    if x.ndim == spatial + 2 and x.shape[1] == channels:
        return None
    if x.ndim == spatial + 2 and x.shape[-1] == channels:
        order = ", ".join(map(str, (0, spatial + 1, *range(1, spatial + 1))))
        return Mismatch(takes, _shape(x), "the channels come first", f"{{x}}.permute({order})")
    if x.ndim == spatial + 1 and channels == 1:
        return Mismatch(takes, _shape(x), "give them a channel", "{x}.unsqueeze(1)")
    return Mismatch(takes, _shape(x), CHECK_TRANSFORMS)


def _input_width(module: nn.Module) -> int | None:
    """The last dimension that a module takes."""
    for kind, name in ((nn.Linear, "in_features"), (nn.RNNBase, "input_size"), (nn.MultiheadAttention, "embed_dim")):
        if isinstance(module, kind):
            return int(getattr(module, name))
    return int(module.normalized_shape[-1]) if isinstance(module, nn.LayerNorm) else None


def _short_name(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _describe_batch(batch: Any) -> str:
    inputs = inputs_of(batch)
    named = inputs.items() if isinstance(inputs, Mapping) else [("", leaf) for leaf in leaves(inputs)]
    return ", ".join(f"{k} {_short_name(x.dtype)} {_shape(x)}".strip() for k, x in named if isinstance(x, Tensor))

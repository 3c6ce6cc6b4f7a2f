"""nn.Module → what the engines need: trained parameters by name, and outputs(model, batch) → [n, C]."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkwatch import interruption
from ntkwatch.default_device import theirs
from ntkwatch.plain import eager, not_reentrant, places_of, unfused, unwrap

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
OutputsFn = Callable[[nn.Module, Any], Tensor]


class UnsupportedModel(ValueError):
    """A model whose per-example kernel does not exist, or that an engine cannot do; the message says what to change."""


class _Forward(nn.Module):
    """Wraps a module so that `functional_call` reaches it through any `outputs` function."""

    def __init__(self, module: nn.Module, outputs: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.outputs = outputs

    def forward(self, batch: Any) -> Any:
        return self.outputs(batch)


class Network:
    """The one seam between a module and everything downstream.

    Args:
        module: any nn.Module; a torch.compile'd or DDP-wrapped one is unwrapped.
        outputs: `outputs(module, batch) -> Tensor[n, C]`; None follows `call_module`.
        params: names or globs among the trained parameters; None takes all of them.

    Raises:
        UnsupportedModel: no trained parameter, one that is not initialised yet (lazy modules), trained parameters on
            several devices, or numbers on the meta device.
        ValueError: a name or glob in `params` that matches no trained parameter.
    """

    def __init__(
        self, module: nn.Module, outputs: OutputsFn | None = None, params: str | Sequence[str] | None = None
    ) -> None:
        self.module = unwrap(module)
        self._outputs = outputs
        self._wrapper = _Forward(self.module, self._raw)
        self.parameters: dict[str, Tensor] = _trained(self.module, params)
        _check_devices(self.module, self.parameters)
        self.inside: frozenset[torch.dtype] = frozenset()  # types that a forward pass was seen to use (autocast)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Those of the module as they are now, by name: moving a module replaces them."""
        return dict(self.module.named_buffers())

    @property
    def device(self) -> torch.device:
        """Where the module is now."""
        return next(iter(self.parameters.values())).device

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of parameters or buffers, each where the one that it stands for is, and of its type."""
        held = {**self.parameters, **self.buffers}
        return {name: tensor.to(held.get(name, tensor)) for name, tensor in tensors.items()}

    def rounding(self, outputs: torch.dtype) -> torch.dtype:
        """What outputs of that type are rounded to on their way: the coarsest of it, of all parameters and inside."""
        types = {p.dtype for p in self.module.parameters() if p.is_floating_point() or p.is_complex()} | self.inside
        return max((outputs, *types), key=lambda dtype: torch.finfo(dtype).eps)

    def check_parameters(self) -> None:
        """Raises UnsupportedModel where a trained parameter is no longer the one that was there at construction."""
        now = dict(self.module.named_parameters(remove_duplicate=False))
        gone = [name for name, parameter in self.parameters.items() if now.get(name) is not parameter]
        if gone:
            raise UnsupportedModel(
                f"{', '.join(gone[:3])} {'is' if len(gone) == 1 else 'are'} no longer the parameter that was there at "
                "the start (replaced, renamed or pruned): later kernels cannot be compared with the first"
            )

    def unfrozen(self) -> list[str]:
        """Names of parameters that train now and did not at construction, or are new."""
        known = {id(parameter) for parameter in self.parameters.values()}
        return [name for name, p in self.module.named_parameters() if p.requires_grad and id(p) not in known]

    def outputs(self, batch: Any, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs [n, C] of the batch, differentiable; `state` swaps parameters or buffers by name for this call."""
        interruption.check()
        with eager(), not_reentrant(), unfused():
            try:
                return self._checked(self._called(batch, state), batch)
            except RuntimeError as error:
                if torch.is_grad_enabled() or "does not require grad" not in str(error):
                    raise
            with torch.enable_grad():  # a model that differentiates on its way: energies, physics-informed losses
                return self._checked(self._called(batch, state), batch).detach()

    def _called(self, batch: Any, state: Mapping[str, Tensor] | None) -> Any:
        places = places_of(self.module) if state else {}
        swapped = {f"module.{place}": t for name, t in (state or {}).items() for place in places.get(name, (name,))}
        with theirs():
            if not state:
                return self._raw(batch)
            return torch.func.functional_call(self._wrapper, swapped, (batch,), tie_weights=False)

    @property
    def custom_outputs(self) -> bool:
        """Whether the outputs are something else than the module called on the batch."""
        return self._outputs is not None or callable(getattr(self.module, "ntk_outputs", None))

    def _raw(self, batch: Any) -> Any:
        if self._outputs is not None:
            return self._outputs(self.module, batch)
        if callable(getattr(self.module, "ntk_outputs", None)):
            return self.module.ntk_outputs(batch)  # type: ignore[operator]
        return call_module(self.module, batch)

    def _checked(self, result: Any, batch: Any) -> Tensor:
        f = whole = _as_tensor(result)
        if f.ndim == 1:
            f = f[:, None]
        n = batch_size(inputs_of(batch))
        if f.ndim != 2 or f.shape[0] != n or f.shape[1] == 0 or not f.is_floating_point():
            raise UnsupportedModel(
                f"the output must be real and [n, C] with n = {n} (or [n]), got {tuple(whole.shape)}, {f.dtype}; "
                "pass outputs=lambda model, batch: ... that returns [n, C], for example by pooling over positions"
            )
        return f


def _trained(module: nn.Module, params: str | Sequence[str] | None) -> dict[str, Tensor]:
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedModel(f"parameter {name} is not initialised yet; run one batch through the model first")
    if not trained:
        raise UnsupportedModel(
            "the model has no trained parameter: every one has requires_grad=False, or there is none"
        )
    if params is None:
        return trained
    globs = [params] if isinstance(params, str) else list(params)
    if not globs:
        raise ValueError("params: an empty list matches no trained parameter; None takes all of them")
    for glob in globs:
        if not fnmatch.filter(trained, glob):
            raise ValueError(
                f"params: {glob!r} matches no trained parameter; there are {', '.join(list(trained)[:8])}…"
            )
    return {name: p for name, p in trained.items() if any(fnmatch.fnmatchcase(name, g) for g in globs)}


def _check_devices(module: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Raises UnsupportedModel where part of the model is on the meta device, or trained parameters on several."""
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, t in tensors:
            if t.is_meta:
                raise UnsupportedModel(
                    f"{kind} {name} is on the meta device, without numbers: to_empty and load it first"
                )
    places: dict[torch.device, str] = {}
    for name, p in trained.items():
        places.setdefault(p.device, name)
    if len(places) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise UnsupportedModel(
            f"the trained parameters are on {len(places)} devices ({found}): "
            f"put the model on one, as model.to({str(next(iter(places)))!r})"
        )


def call_module(module: nn.Module, batch: Any) -> Any:
    """Calls the module on a batch as DESIGN's "Batch to outputs" says.

    A mapping goes in as keywords without its labels (whole, where forward takes one argument that is not among the
    keys); of a tuple or list all but the last item; anything else as it is.
    """
    if isinstance(batch, Mapping):
        keywords = inputs_of(batch)
        only = _only_argument(module)
        return module(batch) if only is not None and only not in keywords else module(**keywords)
    if isinstance(batch, tuple | list):
        return module(*batch[:-1]) if len(batch) > 1 else module(*batch)
    return module(batch)


def _only_argument(module: nn.Module) -> str | None:
    """The name of forward's only argument, or None when it takes several or a variable number."""
    try:
        arguments = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    if len(arguments) != 1 or arguments[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        return None
    return arguments[0].name


def _as_tensor(result: Any) -> Tensor:
    """The output tensor of a tensor, a `.logits` or ["logits"] holder, or a tuple (its first)."""
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    if logits is None and isinstance(result, Mapping):
        logits = result.get("logits")
    if logits is None and isinstance(result, tuple | list) and result:
        logits = result[0]
    if isinstance(logits, Tensor):
        return logits
    raise UnsupportedModel(
        f"the model returned {type(result).__name__}, which holds no tensor under .logits, ['logits'] or first place; "
        "pass outputs=lambda model, batch: ... that returns [n, C]"
    )


def inputs_of(batch: Any) -> Any:
    """The inputs: a mapping without its labels, x of (x, y), all but the last of a longer tuple, or itself."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    if isinstance(batch, tuple | list):
        return tuple(batch[:-1]) if len(batch) > 2 else batch[0]
    return batch


def targets_of(batch: Any) -> Tensor | None:
    """The targets of a batch as they are: the value under a label key, or the last item of a tuple; None if absent."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[-1]
    else:
        found = None
    return found if found is None or isinstance(found, Tensor) else _tensor_or_none(found)


def _tensor_or_none(value: Any) -> Tensor | None:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def leaves(batch: Any) -> list[Any]:
    """The leaves of nested mappings, tuples and lists, in order."""
    found: list[Any] = []
    map_leaves(lambda leaf: found.append(leaf), batch)
    return found


def map_leaves(fn: Callable[[Any], Any], batch: Any) -> Any:
    """`fn` of every leaf of nested mappings, tuples, lists and dataclasses, with the containers' types kept."""
    if isinstance(batch, Mapping):
        items = {key: map_leaves(fn, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return items
        new = copy.copy(batch)
        new.update(items)
        return new
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(fn, item) for item in batch))
    if isinstance(batch, tuple | list) and not (batch and all(isinstance(item, str) for item in batch)):
        return type(batch)(map_leaves(fn, item) for item in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_leaves(fn, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return fn(batch)


def batch_size(inputs: Any) -> int:
    """The number of examples: the first dimension of the first tensor among the leaves.

    Raises:
        ValueError: no tensor with at least one dimension is among them.
    """
    for leaf in leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    got = "a tensor of no dimensions" if isinstance(inputs, Tensor) else type(inputs).__name__
    raise ValueError(f"a batch must hold a tensor [n, ...], got {got}; pass tensors, or collate them first")


def is_per_example(leaf: Any, n: int) -> bool:
    """Whether a leaf has one row per example."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == n


def take(batch: Any, rows: slice | list[int]) -> Any:
    """The batch restricted to some rows: leaves whose first dimension is n are indexed, others are kept."""
    n = batch_size(inputs_of(batch))

    def pick(leaf: Any) -> Any:
        if is_per_example(leaf, n):
            return leaf[rows]
        if isinstance(leaf, tuple | list) and len(leaf) == n:
            return leaf[rows] if isinstance(rows, slice) else type(leaf)(leaf[i] for i in rows)
        return leaf

    return map_leaves(pick, batch)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with its tensors on `device`."""
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

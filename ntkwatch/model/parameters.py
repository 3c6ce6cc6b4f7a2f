"""The trained parameters of a module by name, checked: initialised, dense, on one device."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ntkwatch.model.output import UnsupportedModel


def trained_parameters(module: nn.Module, params: str | Sequence[str] | None) -> dict[str, Tensor]:
    """Name -> parameter with requires_grad, of those that `params` matches (None: all).

    Raises:
        UnsupportedModel: there is none, or one is sparse or not initialised.
        ValueError: a name or glob that matches no trained parameter.
    """
    trained: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedModel(f"parameter {name} is not initialised yet; run one batch through the model first")
    if not trained:
        held = any(True for _ in module.parameters())
        raise UnsupportedModel(
            "the model has no trained parameter: "
            + (
                "every one has requires_grad=False; unfreeze some, model.requires_grad_(True)"
                if held
                else "there is none"
            )
        )
    if params is None:
        return _require_dense(trained)
    globs = [params] if isinstance(params, str) else list(params)
    if not globs:
        raise ValueError("params: an empty list matches no trained parameter; None takes all of them")
    for glob in globs:
        if not fnmatch.filter(trained, glob):
            raise ValueError(
                f"params: {glob!r} matches no trained parameter; there are {', '.join(list(trained)[:8])}…"
            )
    return _require_dense({name: p for name, p in trained.items() if any(fnmatch.fnmatchcase(name, g) for g in globs)})


def _require_dense(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Them, unless one is sparse, of which layouts differ in what they take as its gradient."""
    for name, p in trained.items():
        if p.layout is not torch.strided:
            raise UnsupportedModel(
                f"parameter {name} is sparse ({p.layout}): train its values as a dense parameter, and make the matrix "
                "in forward, as torch.sparse_coo_tensor(indices, values, size)"
            )
    return trained


def check_devices(module: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Raises UnsupportedModel where part of the model is on the meta device, or trained parameters on several."""
    for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, t in tensors:
            if t.is_meta:
                raise UnsupportedModel(
                    f"{kind} {name} is on the meta device, without numbers: model.to_empty(device='cpu') and "
                    "load it first"
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

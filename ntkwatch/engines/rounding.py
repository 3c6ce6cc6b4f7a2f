"""The rounding error of a forward pass, measured by perturbing the last digits of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ntkwatch.model import Network

SEED = 0x6E746B77  # unlike the seeds of scripts: their weights come from those streams, and the draws would correlate


def perturb_last_digits(
    network: Network, state: Mapping[str, Tensor] | None, outputs: torch.dtype
) -> dict[str, Tensor]:
    """`state` with each trained weight changed by up to half a unit in the last place of the outputs' rounding.

    The forward pass then rounds differently, and casts of weights (autocast) reach other neighbours: the outputs change
    by about their rounding error.
    """
    half = torch.finfo(network.rounding(outputs)).eps / 2
    draw = torch.Generator().manual_seed(SEED)
    moved = dict(state or {})
    for name, p in network.parameters.items():
        here = moved.get(name, p).detach()
        wide = here.to(torch.promote_types(here.dtype, torch.float32))
        by = half * (2 * torch.rand(here.shape, generator=draw) - 1).to(wide)
        moved[name] = (wide + by * wide).to(here.dtype)
    return moved


def rounding_error(network: Network, x: Any, state: Mapping[str, Tensor] | None, outputs: Tensor) -> Tensor:
    """An estimate of the rounding error of `outputs` [n, C] of `x` at `state`; float64 on the CPU."""
    with torch.no_grad():
        other = network.outputs(x, perturb_last_digits(network, state, outputs.dtype))
    return (other.double() - outputs.to(other.device).double()).cpu()

"""What later probes are compared with: K_0, θ_0 and BatchNorm's statistics s_0, and how far things moved from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.diagnostics import Motion
from ntkwatch.diagnostics.evaluations import NO_THETA_0
from ntkwatch.engines.rounding import perturb_last_digits
from ntkwatch.engines.tangent import jvp
from ntkwatch.model import Network, batch_size, inputs_of
from ntkwatch.model.batch_statistics import calibrated_statistics, running_statistics, untracked_statistics

THETA_0_LIMIT = 2 * 1024**3  # bytes: above this a copy of the parameters is no longer a small guest


@dataclass(frozen=True)
class Baseline:
    """K_0 and its layers (float64), θ_0 (None above 2 GB) and the statistics s_0, all on the CPU."""

    step: int
    kernel: Tensor
    layers: dict[str, Tensor]
    parameters: dict[str, Tensor] | None
    statistics: dict[str, Tensor]

    @classmethod
    def keep(
        cls, step: int, network: Network, kernel: Tensor, layers: dict[str, Tensor], statistics: Mapping[str, Tensor]
    ) -> Baseline:
        """The baseline that the network is now."""
        size = sum(p.numel() * p.element_size() for p in network.parameters.values())
        theta = _copies(network.parameters) if size <= THETA_0_LIMIT else None
        return cls(step, kernel, layers, theta, _copies(statistics))

    def tensors(self) -> dict[str, Tensor]:
        """One flat mapping for the side file of the record."""
        groups = {"layer": self.layers, "theta": self.parameters or {}, "statistics": self.statistics}
        named = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
        return {"kernel": self.kernel, **named}

    @classmethod
    def from_tensors(cls, step: int, tensors: Mapping[str, Tensor]) -> Baseline:
        """The inverse of `tensors`."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + "/")}

        return cls(step, tensors["kernel"], group("layer"), group("theta") or None, group("statistics"))

    def state(self, network: Network) -> dict[str, Tensor] | None:
        """θ_0 and s_0 by name, for evaluating the network there, where it is now; None where θ_0 was not kept."""
        return None if self.parameters is None else network.placed({**self.parameters, **self.statistics})

    def motion(self, network: Network, batch: Any, outputs: Tensor) -> Motion | str:
        """Δf and J_0 Δθ on the batch, whose outputs now (at s_0) are given [n, C]; a reason where θ_0 was not kept."""
        start = self.state(network)
        if start is None:
            return NO_THETA_0
        if unfrozen := network.unfrozen():
            return f"{len(unfrozen)} parameters train now that did not at the baseline ({unfrozen[0]}, …)"
        direction = {name: p.detach() - start[name] for name, p in network.parameters.items()}
        f_0, j0_delta_theta, how = jvp(network, batch, start, direction)
        # The tangent at θ_0 once more, rounded otherwise: what changes is rounding.
        f_r, j_r, _ = jvp(network, batch, perturb_last_digits(network, start, outputs.dtype), direction)
        f, f_0, j, f_r, j_r = (t.detach().double().cpu() for t in (outputs, f_0, j0_delta_theta, f_r, j_r))
        rounded_to = str(network.rounding(outputs.dtype)).removeprefix("torch.")
        return Motion(f - f_0, j, how, f_r - f_0, j_r - j, rounded_to)


def first_statistics(network: Network, batches: Sequence[Any]) -> tuple[dict[str, Tensor], str | None]:
    """BatchNorm's statistics s_0 by name, calibrated where none has been tracked, and what to say.

    batches: the probes, then others to calibrate on, which are left out where the network does not take them.
    """
    if not untracked_statistics(network.module):
        return {name: b.detach().clone() for name, b in running_statistics(network.module).items()}, None
    try:
        return calibrated_statistics(network, batches), _calibrated_on(batches)
    except Exception:
        if len(batches) == 1:
            raise
    return calibrated_statistics(network, batches[:1]), _calibrated_on(batches[:1])  # another form, or too large


def _calibrated_on(batches: Sequence[Any]) -> str:
    rows = sum(batch_size(inputs_of(batch)) for batch in batches)
    which = "the probes and the first training batch" if len(batches) > 1 else "the probes"
    return f"BatchNorm has tracked no batch yet: the baseline uses statistics calibrated on {rows} rows ({which})"


def parameter_distances(network: Network, baseline: Baseline | None) -> dict[str, tuple[float, float]] | str:
    """Parameter name -> (‖θ − θ_0‖, ‖θ_0‖); a reason where θ_0 was not kept. None: the network is the baseline."""
    now = network.parameters
    start = now if baseline is None else baseline.parameters
    if start is None:
        return NO_THETA_0
    pairs = torch.stack([_distance(p.detach(), start[name].detach()) for name, p in now.items()]).tolist()
    return {name: (moved, length) for name, (moved, length) in zip(now, pairs, strict=True)}


def _distance(p: Tensor, start: Tensor) -> Tensor:
    """(‖θ − θ_0‖, ‖θ_0‖) of one parameter, where it is: a GPU is not waited for, and no copy of all is made."""
    wide = torch.promote_types(p.dtype, torch.float32)
    a, b = p.to(wide), start.to(p.device, wide)
    exact = torch.promote_types(wide, torch.float64) if p.device.type != "mps" else wide
    return torch.stack([torch.linalg.vector_norm(x, dtype=exact) for x in (a - b, b)])


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

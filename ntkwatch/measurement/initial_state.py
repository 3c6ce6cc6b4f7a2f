"""A module as it was before its first training step, for a baseline that can only be measured some steps later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ntkwatch.measurement.baseline import THETA_0_LIMIT


class InitialState:
    """Copies, on the CPU, of a module's parameters and buffers, and which parameters it trains.

    Above 2 GB the parameters that are not trained are left out: they stay where they are. Where the trained ones and
    the buffers alone are more, nothing is kept: ask `fits` first.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._trains = {name: p.requires_grad for name, p in module.named_parameters()}
        self._copies = {name: t.detach().cpu().clone() for name, t in _kept(module).items()}

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether the copies are small enough to be a guest's."""
        return _size(_kept(module)) <= THETA_0_LIMIT

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the module is as it was. The run's own tensors are set aside meanwhile, not written to."""
        now = _tensors(self._module)
        parameters = dict(self._module.named_parameters())
        if gone := [name for name in self._trains if name not in parameters]:
            raise ValueError(f"{', '.join(gone[:3])} were replaced before there were enough probes: pass probes=")
        aside = [(now[name], now[name].data) for name in self._copies if name in now]
        trained = [(p, p.requires_grad) for p in parameters.values()]
        try:
            for name, copy in self._copies.items():
                if name in now:  # a buffer may have gone
                    now[name].data = copy.to(now[name])
            for name, trains in self._trains.items():
                parameters[name].requires_grad_(trains)
            yield
        finally:
            for tensor, data in aside:
                tensor.data = data
            for parameter, trains in trained:
                parameter.requires_grad_(trains)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _kept(module: nn.Module) -> dict[str, Tensor]:
    tensors = _tensors(module)
    if _size(tensors) <= THETA_0_LIMIT:
        return tensors
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

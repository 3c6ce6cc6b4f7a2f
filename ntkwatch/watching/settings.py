"""The arguments of `NTKWatch`, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ntkwatch import probes as probing
from ntkwatch.diagnostics import select
from ntkwatch.measurement.arguments import check_arguments


@dataclass(frozen=True)
class Settings:
    """What the user passed; `monitor` holds what goes to the Monitor as it is."""

    wanted: probing.ProbeRequest
    targets: Tensor | Callable[[Any], Tensor] | None
    every: str | int | Sequence[int] | Callable[[int], bool]
    budget: float | None
    resample: bool
    save_kernels: bool
    loggers: Sequence[Any] | None
    hparams: Mapping[str, Any]
    seed: int
    monitor: Mapping[str, Any]

    @classmethod
    def checked(
        cls, probes: Any, every: Any, budget: float | None, seed: int, *, hparams: Any, **given: Any
    ) -> Settings:
        """Raises ValueError for what is of an unknown value or kind; `given`: the callback's other arguments."""
        names = ("outputs", "loss", "reduction", "engine", "diagnostics")
        monitor = {name: given.pop(name) for name in names}
        select(monitor["diagnostics"])
        apart = {name: monitor[name] for name in ("outputs", "loss")}
        check_arguments(monitor["reduction"], monitor["engine"], seed, hparams=hparams, **apart, **given)
        wanted = probing.parse_probes(probes)
        if given["resample"] and wanted.data is not None:
            raise ValueError("resample=True draws fresh probes each time: pass a number, 'val' or 'train' as probes=")
        kept: dict[str, Any] = {**given, "hparams": dict(hparams or {}), "monitor": {**monitor, "seed": seed}}
        return cls(wanted=wanted, every=every, budget=budget, seed=seed, **kept)

    @property
    def explicit(self) -> bool:
        """Whether the user passed what may not fit the model, and should then be told by an error."""
        return self.wanted.data is not None or self.monitor["outputs"] is not None or self.targets is not None

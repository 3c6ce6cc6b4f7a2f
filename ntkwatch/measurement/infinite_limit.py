"""The infinitely wide network that the model being watched is a draw of: its kernels, and how signals pass it.

Computed once, at the baseline, where `infinite.from_module` understands the model and the kernel costs little. The cost
is estimated from shapes alone, so that runs of one sweep agree on how many probes it is computed on. Everything else
is a reason in words; nothing that goes wrong here costs a run more than this number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch import infinite
from ntkwatch.engines.functional import is_out_of_memory
from ntkwatch.model import Network, raw_of
from ntkwatch.record import Limit

ALLOWED = 2.0  # nominal seconds: within the free allowance of a budget
MIN_LIMIT_PROBES = 8  # probes: fewer say little about a kernel
NO_LIMIT = "no infinite-width limit: "
WITHOUT = "set monitor.nngp to it, [n, n] of the probes, or take ntkgp_nll and ntkgp_coverage, which need none"
PROPAGATED = 16  # probes of the signal-propagation check


@dataclass(frozen=True)
class WideLimit:
    """kernel: K_∞ and the probes it is on, or why there is none. advice: on signal propagation, "" without."""

    kernel: Limit | str
    advice: str = ""

    def __str__(self) -> str:
        """What is compared, in words."""
        if isinstance(self.kernel, str):
            return f"{NO_LIMIT}{self.kernel}"
        return f"infinite-width limit on {len(self.kernel.rows)} probes. {self.advice}"

    def prior(self, given: Tensor | None, n: int) -> tuple[Tensor, Tensor] | str:
        """An NNGP kernel [m, m] and the probes that it is on, [m]; or why there is none, and what to do.

        given: of all n probes, by the user; it goes before the limit's own.
        """
        if given is not None:
            if given.shape != (n, n):
                return f"the NNGP kernel must be {[n, n]}, one row for each probe; it is {list(given.shape)}"
            return given.detach().double().cpu(), torch.arange(n)
        if isinstance(self.kernel, str):
            return f"no NNGP kernel is known, for there is {NO_LIMIT}{self.kernel.rstrip('.')}; {WITHOUT}"
        if self.kernel.nngp is None:
            return f"the record that this run continues keeps no NNGP kernel: {WITHOUT}"
        return self.kernel.nngp.double(), self.kernel.rows


def wide_limit(network: Network, batch: Any, calibrated: bool = False) -> WideLimit:
    """K_∞ of the model on the batch's inputs, trace-reduced; call it where nothing has been trained, inside the guard.

    calibrated: whether the baseline's BatchNorm statistics come from data.
    """
    try:
        return _limit(network, batch, calibrated)
    except infinite.ConversionError as error:
        return WideLimit(str(error))
    except Exception as error:  # fx runs the user's forward on what is no tensor, and may raise anything
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return WideLimit("there is no memory for it")
        return WideLimit(f"it failed ({type(error).__name__}: {error})")


def _limit(network: Network, batch: Any, calibrated: bool) -> WideLimit:
    if reason := _not_comparable(network, batch, calibrated):
        return WideLimit(reason)
    x = _only_input(network, batch).detach()
    spec = infinite.from_module(network.module)
    x = x.cpu() if x.device.type == "mps" else x  # which has no float64
    rows = _affordable(spec, x, len(x), ALLOWED)
    if len(rows) < MIN_LIMIT_PROBES and len(rows) < len(x):
        seconds = infinite.nominal_seconds(spec, x[:MIN_LIMIT_PROBES])
        return WideLimit(
            f"K_∞ on {min(MIN_LIMIT_PROBES, len(x))} probes takes some {seconds:.0f} s (at most {ALLOWED:g} here): "
            "compute it with infinite.kernel(infinite.from_module(model), x)"
        )
    found = infinite.kernel(spec, x[rows].double(), generator=torch.Generator().manual_seed(0))
    few = _affordable(spec, x, min(PROPAGATED, len(x)), ALLOWED / 8)  # it works on all pairs at once
    advice = infinite.signal_propagation(spec, x[few].double()).advice if len(few) > 1 else ""
    if found.ntk_error is not None:
        advice = f"{_error(found.ntk, found.ntk_error)} {advice}"
    return WideLimit(Limit(found.ntk.cpu(), rows.cpu(), found.nngp.cpu()), advice)


def _error(ntk: Tensor, error: Tensor) -> str:
    """That the limit is an estimate, and how good a one."""
    return f"Softmax attention makes it a Monte Carlo estimate, to {float(error.norm() / ntk.norm()):.1g} of its norm."


def _not_comparable(network: Network, batch: Any, calibrated: bool) -> str | None:
    """Why the kernel that is measured is not that of module(x)."""
    x = _only_input(network, batch)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return "the inputs are not one tensor of numbers"
    if network.custom_outputs:
        return "outputs= (or ntk_outputs) is not the module's forward, which is what from_module reads"
    if calibrated:
        return "BatchNorm's statistics at the baseline depend on the data, which has no closed form"
    return None


def _only_input(network: Network, batch: Any) -> Any:
    """What goes into the module, where that is one thing; else all of it."""
    found = network.reading(batch).inputs(raw_of(batch))
    return found[0] if len(found) == 1 else found


def _affordable(spec: infinite.Layer, x: Tensor, most: int, seconds: float) -> Tensor:
    """As many of the probes as the seconds pay for, at most `most`, evenly spread; none where one is too many."""
    one = infinite.nominal_seconds(spec, x[:1])
    m = most
    while m > 0 and one * m * (m + 1) / 2 > seconds:
        m -= 1
    spread = [round(i * (len(x) - 1) / max(m - 1, 1)) for i in range(m)]
    return torch.tensor(spread, dtype=torch.long, device=x.device)

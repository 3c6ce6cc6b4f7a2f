"""One named number: how it is computed, and what it needs to be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ntkwatch.diagnostics.view import View

Compute = Callable[[View], "Tensor | float"]


@dataclass(frozen=True)
class Price:
    """What a diagnostic costs beyond the probe's kernel, in units that a plan can price; all that share it pay once.

    Attributes:
        text: the cost in words.
        passes: forward passes over the probes; a backward pass counts two, a forward-mode product two.
        per_output: further passes for each of the C outputs.
        kernels: further kernels as rich as the measured one.
        squares, fulls: operations over n³ and (nC)³: 6 for eigenvalues, 14 with vectors, as timed beside products.
        weights: operations over those of each weight matrix times its transpose.
        sweeps: how often the kernel's entries are read for each probe left out.
    """

    text: str
    passes: float = 0.0
    per_output: float = 0.0
    kernels: float = 0.0
    squares: float = 0.0
    fulls: float = 0.0
    weights: float = 0.0
    sweeps: float = 0.0


@dataclass(frozen=True)
class Diagnostic:
    """A function of a view, whose docstring is what `ntkwatch explain` prints.

    Attributes:
        compute: returns the number or raises `Undefined` with the reason.
        default: in the preset "default".
        when: whether the name exists for a model (BatchNorm has its own).
        reduction: the reduction it needs: "any" (whatever the run's is), "blocks" or "full".
        needs: of "targets", "loss", "optimizer", "forecast", "limit", "nngp": undefined without.
        beside: names that are reported with it, so that it can be read.
        by_name: in no preset: it has to be asked for by its name.
        cost: what it costs beyond the kernel and a few passes over its entries; None for nothing.
    """

    compute: Compute
    default: bool = False
    when: Callable[[View], bool] = lambda view: True
    reduction: str = "any"
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    by_name: bool = False
    cost: Price | None = None


def documented(text: str) -> Callable[[Compute], Compute]:
    """Give a function made in a loop the docstring that `explain` prints."""

    def decorate(compute: Compute) -> Compute:
        compute.__doc__ = text
        return compute

    return decorate

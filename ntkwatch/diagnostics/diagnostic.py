"""One named number: how it is computed, and what it needs to be there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ntkwatch.diagnostics.view import View

Compute = Callable[[View], "Tensor | float"]


@dataclass(frozen=True)
class Diagnostic:
    """A function of a view, whose docstring is what `ntkwatch explain` prints.

    Attributes:
        compute: returns the number or raises `Undefined` with the reason.
        default: in the preset "default".
        when: whether the name exists for a model (BatchNorm has its own).
        reduction: the reduction it needs: "any" (whatever the run's is), "blocks" or "full".
        needs: of "targets", "loss", "optimizer", "forecast": undefined without.
        beside: names that are reported with it, so that it can be read.
        cost: what it costs beyond the kernel and small linear algebra; "" for nothing.
    """

    compute: Compute
    default: bool = False
    when: Callable[[View], bool] = lambda view: True
    reduction: str = "any"
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    cost: str = ""


def documented(text: str) -> Callable[[Compute], Compute]:
    """Give a function made in a loop the docstring that `explain` prints."""

    def decorate(compute: Compute) -> Compute:
        compute.__doc__ = text
        return compute

    return decorate

"""The registry of rules: a node's saved tensors and output gradients → the per-example factor of one of its inputs.

The node's name and the number of the input select the rule. Without a rule, `masked` runs the node's own backward
formula once per example, with the gradients of other examples set to zero: correct for every operation, but slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.factors import Dense, Factor
from ntkwatch.engines.graph import pull, variable_of
from ntkwatch.engines.layouts import Layout, Scattered
from ntkwatch.engines.per_output import PerOutput


@dataclass(frozen=True)
class Use:
    """An edge of the graph at which examples separate: input `k` of `node`, of shape `shape`, with n examples.

    `grads` are the gradients of the node's outputs, None for outputs without one.
    """

    node: Any
    k: int
    shape: tuple[int, ...]
    grads: tuple[PerOutput | None, ...]
    layout: Layout | Scattered
    n: int

    @property
    def g(self) -> PerOutput:
        """The gradients of the first output, in its shape."""
        g = self.grads[0]
        assert g is not None
        return g

    @property
    def outputs(self) -> int:
        """Number of outputs C of the model."""
        return len(next(g for g in self.grads if g is not None))

    def of_output(self, c: int) -> list[Tensor | None]:
        """The arguments of the node's own backward formula for one of the C outputs."""
        return [None if g is None else g[c] for g in self.grads]

    def examples(self, t: Tensor, lead: int = 0) -> Tensor:
        """[*shape] → [n, *shape per example], after `lead` other dimensions."""
        assert isinstance(self.layout, Layout)
        return self.layout.split(t, self.n, lead)

    def by_example(self, grads: PerOutput) -> PerOutput:
        """C × [*shape] → C × [n, *shape per example]."""
        return grads.over(lambda t: self.examples(t, t.ndim - grads.ndim))


EACH = " by examples"  # suffix of the rule name that `masked` reports
Rule = Callable[[Use], Factor | None]
_RULES: dict[tuple[str, int], Rule] = {}
_SCATTERED_RULES: dict[tuple[str, int], Rule] = {}


def rule(*targets: tuple[str, int], scattered: bool = False) -> Callable[[Rule], Rule]:
    """Registers a function for inputs of nodes by name; `scattered` means rows whose owners follow no pattern."""

    def register(fn: Rule) -> Rule:
        (_SCATTERED_RULES if scattered else _RULES).update(dict.fromkeys(targets, fn))
        return fn

    return register


def factor(use: Use) -> tuple[Factor, str]:
    """The factor of a use, and the name of the rule that computed it."""
    rules = _RULES if isinstance(use.layout, Layout) else _SCATTERED_RULES
    found = None if _complex(use) else rules.get((use.node.name(), use.k))
    result = found(use) if found is not None else None
    if found is not None and result is not None:
        return result, found.__name__.strip("_").replace("_", " ")
    return masked(use), f"{use.node.name()}{EACH}"


def _complex(use: Use) -> bool:
    """Whether gradients are complex; the rules do not conjugate."""
    return any(g is not None and g.dtype.is_complex for g in use.grads)


def is_dense(t: Tensor) -> bool:
    """Whether an operand is stored densely: a sparse matrix has no rows to read."""
    return t.layout is torch.strided


def masked(use: Use) -> Dense:
    """The Jacobian from one backward call of this single node per example and output."""
    owners = _owners(use)

    def one(example: int, c: int) -> Tensor:
        pairs = zip(use.of_output(c), owners, strict=True)
        grads = [None if g is None or owner is None else torch.where(owner.eq(example), g, 0) for g, owner in pairs]
        return pull(use.node, grads, use.k, use.shape).flatten()

    def every(c: int) -> list[Tensor]:
        return [one(i, c) for i in range(use.n)]

    with torch.no_grad():
        return Dense(PerOutput(tuple(torch.stack(every(c)) for c in range(use.outputs))))


def sum_over(t: Tensor, dims: Sequence[int]) -> Tensor:
    """The sum over some dimensions; a view if they all have size 1, so that weight and bias share products."""
    if all(t.shape[d] == 1 for d in dims):
        return t.squeeze(tuple(dims))
    return t.sum(list(dims))


def _owners(use: Use) -> list[Tensor | None]:
    """The example that owns each entry of each output gradient."""
    if isinstance(use.layout, Scattered):
        return [use.layout.owner] * len(use.grads)
    return [None if g is None else use.layout.owner(g.shape, use.n).to(g.device) for g in use.grads]


def operand_shape(node: Node, k: int) -> tuple[int, ...]:
    """The shape of input `k` of a node: the shape of its gradient."""
    child, number = node.next_functions[k]
    assert child is not None
    variable = variable_of(child)
    if variable is not None:
        return tuple(variable.shape)
    return tuple(child._input_metadata[number].shape)


def scaled(node: Any, grads: PerOutput, name: str = "_saved_alpha") -> PerOutput:
    """The gradients times the node's saved scalar, by default alpha."""
    alpha = getattr(node, name, 1)
    return grads if alpha == 1 else grads.over(lambda g: g * alpha)

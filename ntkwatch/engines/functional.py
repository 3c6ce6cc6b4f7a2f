"""The reference engine: torch.func's vmap(jacrev(functional_call)), contracted per parameter, in blocks of probes."""

from __future__ import annotations

import contextlib
import operator
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from functools import reduce as reduce_with
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkwatch.engines.base import (
    Kernel,
    Precision,
    Reduction,
    at_hand,
    noise_floor,
    reduce,
    richest,
    signs,
    work_dtype,
)
from ntkwatch.engines.blocks import assemble, blocks
from ntkwatch.engines.coupling import check_uncoupled
from ntkwatch.engines.grad_attribute import returned_gradients
from ntkwatch.engines.memory import backing_off, is_out_of_memory, limit_bytes
from ntkwatch.model import (
    Network,
    UnsupportedModel,
    as_batch,
    batch_size,
    inputs_of,
    take,
)
from ntkwatch.model.wrappers import eager

USE_ANOTHER = "; use engine='layerwise' or 'auto'"
_STRETCH = 1 << 13  # terms of one product, which bounds the error of float32 sums
_BLOCK_BYTES = 1 << 30  # Jacobians of one pair of blocks, unless chunk_size is given


class Functional:
    """Exact for any model that torch.func can transform; it holds the Jacobians of two blocks in memory."""

    name = "functional"

    def kernel(
        self,
        network: Network,
        x1: Any,
        x2: Any = None,
        *,
        reduction: Reduction = "trace",
        layers: Reduction | None = "trace",
        state: Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
        precision: Precision = "double",
        signed: bool = False,
    ) -> Kernel:
        """See `Engine.kernel`.

        Raises:
            UnsupportedModel: torch.func cannot transform the model, or examples of x2 are coupled.
            MemoryError: a single probe needs too much memory.
        """
        parameters, precision = trained_at(network, state), at_hand(precision, network.device)
        dtype = work_dtype(next(iter(parameters.values())).dtype, precision)
        with torch.no_grad():
            outputs = network.outputs(x1, state).detach()
        n = max(batch_size(inputs_of(x)) for x in (x1, x2) if x is not None)
        if x2 is not None and batch_size(inputs_of(x2)) != batch_size(inputs_of(x1)):
            check_uncoupled(network, x2, state)
        chunk = min(n, chunk_size or self.chunk(parameters, outputs.shape[1], limit_bytes(network.device)))
        rich = richest(reduction, layers)

        def attempt(size: int) -> dict[str, Tensor]:
            other = None if x2 is None else blocks(x2, size)
            return self.by_parameter(network, blocks(x1, size), other, state, rich, dtype, signed)

        with returned_gradients(network):
            value, kept = together(backing_off(attempt, chunk, network.device), rich, reduction, layers)
        floor = noise_floor(network.rounding(outputs.dtype), precision)
        return Kernel(value, kept, outputs, reduction, self.name, precision, floor)

    def by_parameter(
        self,
        network: Network,
        blocks1: list[Any],
        other: list[Any] | None,
        state: Mapping[str, Tensor] | None,
        reduction: Reduction,
        dtype: torch.dtype,
        signed: bool = False,
    ) -> dict[str, Tensor]:
        """One kernel per parameter between the blocks and those of `other` (None: themselves), in `reduction`'s shape.

        Raises:
            UnsupportedModel: torch.func cannot transform the model.
        """
        parameters, blocks2 = trained_at(network, state), blocks1 if other is None else other

        @lru_cache(maxsize=2)
        def jacobian(first: bool, i: int) -> dict[str, Tensor]:
            return self._jacobian(network, (blocks1 if first else blocks2)[i], parameters, state)

        def cell(i: int, j: int) -> dict[str, Tensor]:
            j1, j2 = jacobian(True, i), jacobian(other is None, j)
            right = {name: signs(j.reshape(*j.shape[:2], -1)) for name, j in j2.items()} if signed else j2
            return {name: contract(j1[name], right[name], reduction, dtype) for name in parameters}

        sizes = [[batch_size(inputs_of(b)) for b in each] for each in (blocks1, blocks2)]
        return assemble(sizes[0], None if other is None and not signed else sizes[1], cell, lambda _: reduction)

    def chunk(self, parameters: Mapping[str, Tensor], n_outputs: int, limit: int) -> int:
        """Probes per block such that Jacobians of two blocks, and as much temporary memory, fit in `limit` bytes."""
        per_probe = n_outputs * 4 * sum(p.numel() * p.element_size() for p in parameters.values())
        return max(1, min(_BLOCK_BYTES, limit) // per_probe)

    def _jacobian(
        self, network: Network, block: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Per-example Jacobians by name, [n, C, *shape]."""
        known = as_batch(block)
        if any(known.differentiated):  # by the model itself, which torch.func's transforms do not allow
            return _one_by_one(network, known, parameters, state)
        rest = {name: value for name, value in (state or {}).items() if name not in parameters}

        def f(theta: dict[str, Tensor], *row: Tensor) -> Tensor:
            return network.outputs(known.with_rows([t[None] for t in row], 1), {**rest, **theta})[0]

        try:
            rows = known.per_example()
            with math_attention(), eager():
                return vmap(jacrev(f), (None, *(0 for _ in rows)))(dict(parameters), *rows)
        except UnsupportedModel:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            first = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
            raise UnsupportedModel(f"torch.func cannot transform this model ({first}){USE_ANOTHER}") from error


def _one_by_one(
    network: Network, block: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Per-example Jacobians by plain backward passes, one example and one output at a time."""
    at = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    rows = []
    for i in range(batch_size(block)):
        f = network.outputs(take(block, slice(i, i + 1)), {**(state or {}), **at})[0]
        rows.append([torch.autograd.grad(y, [*at.values()], retain_graph=True, materialize_grads=True) for y in f])
    columns = [torch.stack([torch.stack([g[k] for g in row]) for row in rows]) for k in range(len(at))]
    return dict(zip(at, columns, strict=True))


def trained_at(network: Network, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The trained parameters by name, at `state` where it holds them."""
    return {name: (state or {}).get(name, p).detach() for name, p in network.parameters.items()}


def together(
    theta: Mapping[str, Tensor], source: Reduction, reduction: Reduction, layers: Reduction | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The kernel of all parameters in `reduction`, and of each one in `layers`, from those of each in `source`."""
    total = torch.stack(list(theta.values())).sum(0)
    kept = {} if layers is None else {name: reduce(t, source, layers) for name, t in theta.items()}
    return reduce(total, source, reduction), kept


def contract(j1: Tensor, j2: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """The kernel of two blocks of one parameter's Jacobians [n, C, ...]; products in `dtype`, in chunks of terms."""
    a, b = (j.detach().reshape(*j.shape[:2], -1) for j in (j1, j2))
    n_outputs = a.shape[1]
    if reduction == "sum":
        a, b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
    formula = "ncp,mdp->ncmd" if reduction == "full" else "ncp,mcp->cnm"
    pieces = zip(*(t.split(_STRETCH, 2) for t in (a, b)), strict=True)
    total = reduce_with(operator.iadd, (torch.einsum(formula, x.to(dtype), y.to(dtype)) for x, y in pieces))
    return total if reduction in ("full", "blocks") else total.sum(0) / n_outputs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses torch's warnings about missing batching rules, which cost speed but not correctness."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(performance drop|experimental feature).*")
        yield


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Computes attention by its formula: the fused kernels have no batching rule and no forward mode."""
    with sdpa_kernel(SDPBackend.MATH), quiet():
        yield

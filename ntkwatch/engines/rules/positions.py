"""Rules for parameters whose gradients are sums over positions: biases, scales, normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ntkwatch.engines.factors import Dense, Factor
from ntkwatch.engines.graph import pull
from ntkwatch.engines.layouts import Layout, Scattered
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.rules.use import Use, is_dense, operand_shape, rule, scaled, sum_over

# Sums over positions: bias, scale, normalisation ----------------------------------------------------------------------


def _fold(use: Use, times: Tensor | float = 1) -> Dense | None:
    """Gradients times `times` for an input that was broadcast: C × [n, P]; None if it was not broadcast."""
    assert isinstance(use.layout, Layout)
    rank, dim = use.g.ndim, use.layout.dim
    shape = (1,) * (rank - len(use.shape)) + use.shape
    if rank < len(use.shape) or shape[dim] != 1:
        return None
    return _summed(use, times, [d - rank for d in range(rank) if shape[d] == 1])


def _summed(use: Use, times: Tensor | float, dims: Sequence[int]) -> Dense:
    """Gradients times `times`, summed over some dimensions of an example."""
    weighed = isinstance(times, Tensor) or times != 1
    held: list[Tensor] = []  # one buffer for all outputs: fresh pages cost more than the product

    def summed(g: Tensor) -> Tensor:
        product = torch.mul(g, times, out=held.pop() if held else None) if weighed else g
        total = sum_over(use.examples(product, g.ndim - use.g.ndim), dims)
        if weighed and total.numel() < product.numel():  # otherwise it may be a view of the product
            held.append(product)
        return _flat(total, use.g.ndim - len(dims))

    return Dense(use.g.over(summed))


def _flat(t: Tensor, rank: int) -> Tensor:
    """Flattens the last `rank` dimensions; adds one if `rank` is 0."""
    return t.flatten(-rank) if rank else t[..., None]


@rule(("AddmmBackward0", 0))
def _addmm_bias(use: Use) -> Factor | None:
    return _fold(use, getattr(use.node, "_saved_beta", 1))


@rule(("AddmmBackward0", 0), scattered=True)
def _addmm_bias_scattered_rows(use: Use) -> Factor | None:
    """Rows in any order and number per example: gathered by owner, padded with zeros."""
    assert isinstance(use.layout, Scattered)
    if use.shape != use.g.shape[1:]:
        return None
    index = use.layout.rows
    padded = scaled(use.node, use.g, "_saved_beta").over(lambda t: torch.nn.functional.pad(t, (0, 0, 0, 1)))
    return Dense(padded.over(lambda t: t[..., index, :].sum(-2)))


@rule(("AddBackward0", 0), ("SubBackward0", 0), ("ExpandBackward0", 0))
def _added(use: Use) -> Factor | None:
    return _fold(use)


@rule(("AddBackward0", 1))
def _added_second(use: Use) -> Factor | None:
    return _fold(use, getattr(use.node, "_saved_alpha", 1))


@rule(("MulBackward0", 0), ("MulBackward0", 1))
def _multiplied(use: Use) -> Factor | None:
    other = use.node._saved_other if use.k == 0 else use.node._saved_self
    if not isinstance(other, Tensor) or other.is_complex() or not is_dense(other):
        return None
    return _fold(use, other.detach())


@rule(("NativeLayerNormBackward0", 1))
def _layer_norm_weight(use: Use) -> Factor | None:
    x, mean, rstd = use.node._saved_input.detach(), use.node._saved_result1, use.node._saved_result2
    return _fold(use, (x - mean) * rstd)


@rule(("FusedRmsNormBackward0", 1))
def _rms_norm_weight(use: Use) -> Factor | None:
    return _fold(use, use.node._saved_input.detach() * use.node._saved_result1.detach())


@rule(*((f"ThnnFused{cell}CellBackward0", k) for cell in ("Lstm", "Gru") for k in (3, 4)))
def _gate_bias(use: Use) -> Factor | None:
    """A bias of a fused recurrent cell (as on GPUs): it is added to the gates, whose gradient the node returns."""
    assert isinstance(use.layout, Layout)
    gates = use.k - 3
    if use.layout.dim != 0 or use.node.next_functions[gates][0] is None:  # None if the weights are frozen
        return None
    shape = operand_shape(use.node, gates)
    with torch.no_grad():
        found = (pull(use.node, use.of_output(c), gates, shape) for c in range(use.outputs))
        return Dense(PerOutput(tuple(use.examples(g).reshape(use.n, -1, g.shape[-1]).sum(1) for g in found)))


@rule(("NativeLayerNormBackward0", 2))
def _layer_norm_bias(use: Use) -> Factor | None:
    return _fold(use)


@rule(("NativeGroupNormBackward0", 1))
def _group_norm_weight(use: Use) -> Factor | None:
    x, groups = use.node._saved_input.detach(), int(use.node._saved_group)
    mean, rstd = use.node._saved_result1.detach(), use.node._saved_result2.detach()
    grouped = x.reshape(x.shape[0], groups, -1)
    return _channels(use, ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape))


_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")


@rule(("ConvolutionBackward0", 2), ("NativeGroupNormBackward0", 2), *((name, 2) for name in _BATCH_NORMS))
def _channel_bias(use: Use) -> Factor | None:
    return _channels(use)


@rule(*((name, 1) for name in _BATCH_NORMS))
def _batch_norm_weight(use: Use) -> Factor | None:
    node = use.node
    if node._saved_training:
        return None
    x = node._saved_input.detach()
    shape = [1, -1] + [1] * (x.ndim - 2)
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    rstd = (node._saved_running_var.detach() + eps).rsqrt()
    return _channels(use, (x - node._saved_running_mean.detach().reshape(shape)) * rstd.reshape(shape))


def _channels(use: Use, times: Tensor | float = 1) -> Dense | None:
    """Gradients times `times`, summed over all dimensions but the channels (dimension 1)."""
    assert isinstance(use.layout, Layout)
    if use.layout.dim != 0:
        return None
    rank = use.g.ndim
    return _summed(use, times, [-rank, *range(2 - rank, 0)])


@rule(("PreluKernelBackward0", 1))
def _prelu(use: Use) -> Factor | None:
    return _fold(use, use.node._saved_self.detach().clamp(max=0))

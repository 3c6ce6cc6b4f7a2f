"""One node of the graph → the per-example factor of one of its inputs, from what it saved and its output gradient.

A rule is chosen by the node's name and the number of the input. Without one, `masked` runs the node's own backward
formula once per example with the other examples' gradients set to zero: right for every
operation there is, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.factors import Columns, Dense, Factor, Outer, Rows
from ntkwatch.engines.graph import Layout, Scattered, pull


@dataclass(frozen=True)
class Use:
    """An edge of the graph at which examples come apart: input `k` of `node`, of shape `shape`.

    `grads` are the gradients of the node's outputs, [C, *output shape] each, None where it has none.
    """

    node: Any
    k: int
    shape: tuple[int, ...]
    grads: tuple[Tensor | None, ...]
    layout: Layout | Scattered
    n: int

    @property
    def g(self) -> Tensor:
        """The gradient of the first output, [C, *shape]."""
        g = self.grads[0]
        assert g is not None
        return g

    def examples(self, t: Tensor, batch: int = 0) -> Tensor:
        """[*batch, *shape] → [*batch, n, *shape per example]."""
        assert isinstance(self.layout, Layout)
        return self.layout.split(t, self.n, batch)


Rule = Callable[[Use], Factor | None]
_RULES: dict[tuple[str, int], Rule] = {}


def rule(*targets: tuple[str, int]) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, fn))
        return fn

    return register


def factor(use: Use) -> tuple[Factor, str]:
    """The factor of a use, and the name of the rule that gave it."""
    found = _RULES.get((use.node.name(), use.k))
    if found is not None:
        regular = isinstance(use.layout, Layout)
        if not regular and found in (_mm_weight,):
            return _scattered_rows(use), "linear, scattered rows"
        result = found(use) if regular else None
        if result is not None:
            return result, found.__name__.strip("_").replace("_", " ")
    return masked(use), f"{use.node.name()} by examples"


def masked(use: Use) -> Dense:
    """One backward of this single node per example and output."""
    columns = [torch.stack([_one(use, i, c) for c in range(use_outputs(use))]) for i in range(use.n)]
    return Dense(_flat(torch.stack(columns, 1)))


def _sum(t: Tensor, dims: Sequence[int]) -> Tensor:
    """The sum over some dimensions; a view where they have one entry, so that weight and bias share products."""
    if all(t.shape[d] == 1 for d in dims):
        return t.reshape([size for d, size in enumerate(t.shape) if d not in dims])
    return t.sum(list(dims))


def _flat(j: Tensor) -> Tensor:
    """[C, n, ...] → [C, n, P], also where nothing follows."""
    return j.reshape(*j.shape[:2], -1)


def use_outputs(use: Use) -> int:
    return next(g for g in use.grads if g is not None).shape[0]


def _one(use: Use, example: int, output: int) -> Tensor:
    grads = [None if g is None else _only(use, g[output], example) for g in use.grads]
    with torch.no_grad():
        return pull(use.node, grads, use.k, use.shape)


def _only(use: Use, g: Tensor, example: int) -> Tensor:
    if isinstance(use.layout, Scattered):
        owner = use.layout.owner
    else:
        owner = use.layout.owner(g.shape, use.n).to(g.device)
    return torch.where(owner == example, g, torch.zeros((), dtype=g.dtype, device=g.device))


# Matrix products: a [n, G, S, p], g [C, n, G, S, q] ------------------------------------------------------------------


def _scale(node: Any, g: Tensor, name: str = "_saved_alpha") -> Tensor:
    alpha = getattr(node, name, 1)
    return g if alpha == 1 else g * alpha


@rule(("AddmmBackward0", 2), ("MmBackward0", 1))
def _mm_weight(use: Use) -> Factor | None:
    """x @ W with x [R, p], W [p, q]."""
    x = use.node._saved_mat1 if hasattr(use.node, "_saved_mat1") else use.node._saved_self
    if not isinstance(use.layout, Layout) or use.layout.dim != 0:
        return None
    g = _scale(use.node, use.g)
    return Outer(Columns.of(use.examples(x.detach())[:, None]), use.examples(g, 1)[:, :, None], a_first=True)


@rule(("AddmmBackward0", 1), ("MmBackward0", 0))
def _mm_left_weight(use: Use) -> Factor | None:
    """W @ x with W [r, p], x [p, R]."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 1:
        return None
    x = use.node._saved_mat2.detach()
    a = use.examples(x).transpose(1, 2)[:, None]
    g = use.examples(_scale(use.node, use.g), 1).transpose(2, 3)[:, :, None]
    return Outer(Columns.of(a), g)


@rule(("BmmBackward0", 1))
def _bmm_weight(use: Use) -> Factor | None:
    """x @ W per group: x [G, R, p], W [G, p, q]."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 1:
        return None
    return Outer(Columns.of(use.examples(use.node._saved_self.detach())), use.examples(use.g, 1), a_first=True)


@rule(("BmmBackward0", 0))
def _bmm_left_weight(use: Use) -> Factor | None:
    """W @ x per group: W [G, r, p], x [G, p, R]."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 2:
        return None
    a = use.examples(use.node._saved_mat2.detach()).transpose(2, 3)
    return Outer(Columns.of(a), use.examples(use.g, 1).transpose(3, 4))


def _scattered_rows(use: Use) -> Outer:
    """Rows in any order and number per example: gathered by owner, padded with zeros."""
    assert isinstance(use.layout, Scattered)
    x = (use.node._saved_mat1 if hasattr(use.node, "_saved_mat1") else use.node._saved_self).detach()
    owner = use.layout.owner.max(1).values
    g = _scale(use.node, use.g)
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=use.n)
    start = counts.cumsum(0) - counts
    slot = torch.arange(len(owner), device=x.device) - start[owner[order]]
    index = torch.full((use.n, max(1, int(counts.max()))), len(owner), device=x.device)
    index[owner[order], slot] = order
    pad_x = torch.cat([x, x.new_zeros(1, x.shape[1])])
    pad_g = torch.cat([g, g.new_zeros(g.shape[0], 1, g.shape[2])], 1)
    return Outer(Columns.of(pad_x[index][:, None]), pad_g[:, index][:, :, None], a_first=True)


# Convolution ----------------------------------------------------------------------------------------------------------


@rule(("ConvolutionBackward0", 1))
def _convolution(use: Use) -> Factor | None:
    """Weight [co, ci/G, *kernel]; transposed: [ci, co/G, *kernel]. Each window of the input is one position."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 0:
        return None
    node = use.node
    kernel, groups = use.shape[2:], int(node._saved_groups)
    stride, padding, dilation = (tuple(getattr(node, f"_saved_{what}")) for what in ("stride", "padding", "dilation"))
    x = use.examples(node._saved_input.detach())
    g = use.examples(use.g, 1)
    if node._saved_transposed:
        windows = _unfold(g.flatten(0, 2), kernel, stride, padding, dilation, groups, x.shape[3:])
        windows = windows.unflatten(0, g.shape[:3]).transpose(2, 3).flatten(3, 4)
        return Outer(Columns.of(_positions(x, groups)), windows, a_first=True)
    size = g.shape[4:]

    def columns() -> Tensor:
        t = _unfold(x.flatten(0, 1), kernel, stride, padding, dilation, groups, size)
        return t.unflatten(0, (-1, x.shape[1])).transpose(1, 2).flatten(2, 3)

    g = _positions(g.flatten(0, 1), groups).unflatten(0, g.shape[:2])
    return Outer(Columns((use.n, groups, g.shape[3], use.shape[1] * _product(kernel)), columns), g)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total


def _positions(t: Tensor, groups: int) -> Tensor:
    """[n, k, channels, *space] → [n, G, k·space, channels/G]."""
    t = t.flatten(3) if t.ndim > 3 else t[..., None]
    return t.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)


def _unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> Tensor:
    """[B, channels, *space] → [B, G, positions, channels/G·kernel] at the `size` output positions."""
    pads = [amount for p in reversed(list(padding)) for amount in (p, p)]
    x = torch.nn.functional.pad(x, pads) if any(pads) else x.contiguous()
    strides = x.stride()
    steps = [st * s for st, s in zip(stride, strides[2:], strict=True)]
    taps = [d * s for d, s in zip(dilation, strides[2:], strict=True)]
    batch, channels = x.shape[:2]
    view = x.as_strided((batch, channels, *size, *kernel), (*strides[:2], *steps, *taps), x.storage_offset())
    d = len(size)
    order = (0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))  # positions last: whole rows are copied at once
    entries = channels // groups * _product(kernel)
    return view.permute(order).reshape(batch, groups, entries, _product(size)).transpose(2, 3)


@rule(("ConvolutionBackward0", 2))
def _convolution_bias(use: Use) -> Factor | None:
    if not isinstance(use.layout, Layout) or use.layout.dim != 0:
        return None
    g = use.examples(use.g, 1)
    return Dense(g.sum([2, *range(4, g.ndim)]))


# Tables ---------------------------------------------------------------------------------------------------------------


@rule(("EmbeddingBackward0", 0))
def _embedding(use: Use) -> Factor | None:
    node = use.node
    if not isinstance(use.layout, Layout) or node._saved_scale_grad_by_freq or use.layout.dim >= use.g.ndim - 2:
        return None
    index = node._saved_indices
    g = use.g
    padding = node._saved_padding_idx
    if padding >= 0 and padding < 2**62:
        g = g.masked_fill((index == padding)[..., None], 0)
    return Rows(use.examples(index).flatten(1), use.examples(g, 1).flatten(2, -2), use.shape[0])


# Sums over positions: bias, scale, normalisation ----------------------------------------------------------------------


def _fold(use: Use, t: Tensor) -> Dense | None:
    """Per-example gradients [C, *output shape] of an input that was broadcast → [C, n, P]; None if it was not."""
    assert isinstance(use.layout, Layout)
    rank, dim = t.ndim - 1, use.layout.dim
    shape = (1,) * (rank - len(use.shape)) + use.shape
    if rank < len(use.shape) or shape[dim] != 1:
        return None
    summed = [2 + d for d in range(rank) if shape[d] == 1]
    return Dense(_flat(_sum(use.examples(t, 1), summed)))


@rule(("AddmmBackward0", 0))
def _addmm_bias(use: Use) -> Factor | None:
    return _fold(use, _scale(use.node, use.g, "_saved_beta"))


@rule(("AddBackward0", 0), ("SubBackward0", 0), ("ExpandBackward0", 0))
def _added(use: Use) -> Factor | None:
    return _fold(use, use.g)


@rule(("AddBackward0", 1))
def _added_second(use: Use) -> Factor | None:
    return _fold(use, _scale(use.node, use.g))


@rule(("MulBackward0", 0), ("MulBackward0", 1))
def _multiplied(use: Use) -> Factor | None:
    other = use.node._saved_other if use.k == 0 else use.node._saved_self
    if not isinstance(other, Tensor) or other.is_complex():
        return None
    return _fold(use, torch.stack([g * other.detach() for g in use.g]))


@rule(("NativeLayerNormBackward0", 1))
def _layer_norm_weight(use: Use) -> Factor | None:
    x, mean, rstd = use.node._saved_input.detach(), use.node._saved_result1, use.node._saved_result2
    normal = (x - mean) * rstd
    return _fold(use, torch.stack([g * normal for g in use.g]))


@rule(("NativeLayerNormBackward0", 2))
def _layer_norm_bias(use: Use) -> Factor | None:
    return _fold(use, use.g)


@rule(("NativeGroupNormBackward0", 1))
def _group_norm_weight(use: Use) -> Factor | None:
    x, groups = use.node._saved_input.detach(), int(use.node._saved_group)
    mean, rstd = use.node._saved_result1.detach(), use.node._saved_result2.detach()
    grouped = x.reshape(x.shape[0], groups, -1)
    return _channels(use, ((grouped - mean[..., None]) * rstd[..., None]).reshape(x.shape))


@rule(("NativeGroupNormBackward0", 2), ("NativeBatchNormBackward0", 2))
def _channel_bias(use: Use) -> Factor | None:
    return _channels(use, None)


@rule(("NativeBatchNormBackward0", 1))
def _batch_norm_weight(use: Use) -> Factor | None:
    node = use.node
    if node._saved_training:
        return None
    x = node._saved_input.detach()
    shape = [1, -1] + [1] * (x.ndim - 2)
    rstd = (node._saved_running_var.detach() + node._saved_eps).rsqrt()
    return _channels(use, (x - node._saved_running_mean.detach().reshape(shape)) * rstd.reshape(shape))


def _channels(use: Use, normal: Tensor | None) -> Dense | None:
    """Σ over all but the channels (dimension 1) of g·normal."""
    assert isinstance(use.layout, Layout)
    if use.layout.dim != 0:
        return None
    g = use.g if normal is None else torch.stack([g * normal for g in use.g])
    g = use.examples(g, 1)
    return Dense(g.sum([2, *range(4, g.ndim)]))


@rule(("PreluKernelBackward0", 1))
def _prelu(use: Use) -> Factor | None:
    x = use.node._saved_self.detach()
    return _fold(use, torch.stack([g * x.clamp(max=0) for g in use.g]))


def operand_shape(node: Node, k: int) -> tuple[int, ...]:
    """The shape of input `k` of a node: that of the output it is the gradient for."""
    child, number = node.next_functions[k]
    assert child is not None
    variable = getattr(child, "variable", None)
    if variable is not None:
        return tuple(variable.shape)
    return tuple(child._input_metadata[number].shape)

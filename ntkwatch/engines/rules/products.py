"""Rules for weights in products: matrix products, convolutions, embedding tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkwatch.engines.factors import Columns, Factor, Outer, Rows
from ntkwatch.engines.layouts import Layout, Scattered
from ntkwatch.engines.rules.use import Use, is_dense, operand_shape, rule, scaled

# Matrix products: a [n, G, S, p], g C × [n, G, S, q] ------------------------------------------------------------------


@rule(("AddmmBackward0", 2), ("MmBackward0", 1))
def _mm_weight(use: Use) -> Factor | None:
    """x @ W with x [R, p], W [p, q]."""
    x = use.node._saved_mat1 if hasattr(use.node, "_saved_mat1") else use.node._saved_self
    if not isinstance(use.layout, Layout) or use.layout.dim != 0 or not is_dense(x):
        return None
    g = use.by_example(scaled(use.node, use.g))
    return Outer(Columns.of(use.examples(x.detach())[:, None]), g.over(lambda t: t.unsqueeze(-3)), a_first=True)


@rule(("AddmmBackward0", 1), ("MmBackward0", 0))
def _mm_left_weight(use: Use) -> Factor | None:
    """W @ x with W [r, p], x [p, R]."""
    x = use.node._saved_mat2.detach()
    if not isinstance(use.layout, Layout) or use.layout.dim != 1 or not is_dense(x):
        return None
    a = use.examples(x).transpose(1, 2)[:, None]
    g = use.by_example(scaled(use.node, use.g))
    return Outer(Columns.of(a), g.over(lambda t: t.transpose(-2, -1).unsqueeze(-3)))


@rule(("BmmBackward0", 1))
def _bmm_weight(use: Use) -> Factor | None:
    """x @ W per group: x [G, R, p], W [G, p, q]."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 1:
        return None
    a = Columns.of(use.examples(use.node._saved_self.detach()))
    return Outer(a, use.by_example(use.g), a_first=True)


@rule(("BmmBackward0", 0))
def _bmm_left_weight(use: Use) -> Factor | None:
    """W @ x per group: W [G, r, p], x [G, p, R]."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 2:
        return None
    a = use.examples(use.node._saved_mat2.detach()).transpose(2, 3)
    return Outer(Columns.of(a), use.by_example(use.g).over(lambda t: t.transpose(-2, -1)))


@rule(("AddmmBackward0", 2), ("MmBackward0", 1), scattered=True)
def _linear_scattered_rows(use: Use) -> Factor | None:
    """Rows in any order and number per example: gathered by owner, padded with zeros."""
    assert isinstance(use.layout, Scattered)
    x = (use.node._saved_mat1 if hasattr(use.node, "_saved_mat1") else use.node._saved_self).detach()
    if not is_dense(x):
        return None
    g, index = scaled(use.node, use.g), use.layout.rows
    pad_x = torch.cat([x, x.new_zeros(1, x.shape[1])])
    pad_g = g.over(lambda t: torch.nn.functional.pad(t, (0, 0, 0, 1)))
    return Outer(Columns.of(pad_x[index][:, None]), pad_g.over(lambda t: t[..., index, :].unsqueeze(-3)), a_first=True)


# Convolution ----------------------------------------------------------------------------------------------------------


@rule(("ConvolutionBackward0", 1))
def _convolution(use: Use) -> Factor | None:
    """Weight [co, ci/G, *kernel]; transposed: [ci, co/G, *kernel]. Each window of the input is one position."""
    if not isinstance(use.layout, Layout) or use.layout.dim != 0:
        return None
    node = use.node
    kernel, groups = use.shape[2:], int(node._saved_groups)
    stride, padding, dilation = (tuple(getattr(node, f"_saved_{what}")) for what in ("stride", "padding", "dilation"))
    window = Window(kernel, stride, padding, dilation, groups)
    x = use.examples(node._saved_input.detach())
    grads, space = use.by_example(use.g), len(kernel)
    if node._saved_transposed:
        windows = grads.over(lambda g: window.unfold(g, x.shape[3:]))
        return Outer(Columns.of(_positions(x, groups, space)), windows, a_first=True)
    size = grads.shape[3:]
    shape = (use.n, groups, x.shape[1] * math.prod(size), use.shape[1] * math.prod(kernel))
    quick = None if groups > 1 else lambda: window.unfold(x, size, channels_last=True)
    columns = Columns(shape, lambda: window.unfold(x, size), quick)
    return Outer(columns, grads.over(lambda g: _positions(g, groups, space)))


def unfolding(node: Any, k: int) -> float:
    """The ratio of a convolution's unfolded input to its output in size; 0 for operands that need no unfolding."""
    if node.name() != "ConvolutionBackward0" or k != 1 or node._saved_transposed:
        return 0.0
    channels, *window = operand_shape(node, k)
    return int(node._saved_groups) * math.prod(window) / channels


def _positions(t: Tensor, groups: int, space: int) -> Tensor:
    """[..., k, channels, *space] → [..., G, k·space, channels/G]."""
    t = t.flatten(-space) if space else t[..., None]
    return t.unflatten(-2, (groups, -1)).movedim((-4, -2), (-3, -1)).flatten(-3, -2)


@dataclass(frozen=True)
class Window:
    """The input window of a convolution at each output position."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def unfold(self, x: Tensor, size: Sequence[int], channels_last: bool = False) -> Tensor:
        """[..., k, channels, *space] → [..., G, k·positions, channels/G·kernel] at the `size` output positions.

        With `channels_last` (one group only) the last dimension is ordered [kernel, channels], so that whole rows are
        copied.
        """
        d = len(size)
        lead, x = x.shape[: -2 - d], x.flatten(0, -2 - d)
        pads = [amount for p in reversed(list(self.padding)) for amount in (p, p)]
        if channels_last:
            x = torch.nn.functional.pad(x.movedim(1, -1), [0, 0, *pads]).contiguous().movedim(-1, 1)
        else:
            x = torch.nn.functional.pad(x, pads).contiguous()
        strides = x.stride()
        steps = [st * s for st, s in zip(self.stride, strides[2:], strict=True)]
        taps = [d * s for d, s in zip(self.dilation, strides[2:], strict=True)]
        batch, channels = x.shape[:2]
        view = x.as_strided((batch, channels, *size, *self.kernel), (*strides[:2], *steps, *taps), x.storage_offset())
        entries = channels // self.groups * math.prod(self.kernel)
        if channels_last:
            return view.movedim(1, -1).reshape(*lead, 1, batch // math.prod(lead) * math.prod(size), entries)
        order = (0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d))  # positions last, so that whole rows are copied
        windows = view.permute(order).reshape(*lead, -1, self.groups, entries, math.prod(size))
        return windows.movedim((-4, -2), (-3, -1)).flatten(-3, -2)


# Tables ---------------------------------------------------------------------------------------------------------------


@rule(("EmbeddingBackward0", 0))
def _embedding(use: Use) -> Factor | None:
    node = use.node
    if not isinstance(use.layout, Layout) or node._saved_scale_grad_by_freq or use.layout.dim >= use.g.ndim - 1:
        return None
    index = node._saved_indices
    g, padding = use.g, node._saved_padding_idx
    if padding >= 0 and padding < 2**62:
        g = g.over(lambda t: t.masked_fill((index == padding)[..., None], 0))
    rows = use.by_example(g).over(lambda t: t.flatten(-use.g.ndim, -2))
    return Rows(use.examples(index).flatten(1), rows, use.shape[0])

"""The kernels of an infinitely wide network between two sets of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ntkwatch.infinite.compose import Serial, Sum
from ntkwatch.infinite.covariances import CrossKernels, Draws, Features, SelfCovariance, join, take
from ntkwatch.infinite.layers import Layer, Positions, State
from ntkwatch.infinite.softmax import MONTE_CARLO
from ntkwatch.infinite.windows import AvgPool, Conv

BLOCK_ENTRIES = {"cpu": 2**17, "other": 2**25}  # kernel entries at work at a time: the cache, and the device's memory

REPLICATES = 8  # of a Monte Carlo, for its error bar


@dataclass(frozen=True)
class InfiniteKernel:
    """nngp: [n1, n2], the covariance of the outputs at initialisation. ntk: [n1, n2], the tangent kernel per output.

    samples: 0 where both are in closed form; else the points of the quasi-Monte Carlo that an activation after a sum of
    activations takes (post-activation residual blocks), with a relative error near 1/samples^0.7, or the draws of the
    Monte Carlo that softmax attention takes.
    nngp_error, ntk_error: standard errors [n1, n2] of that Monte Carlo, None where there is none.
    """

    nngp: Tensor
    ntk: Tensor
    samples: int = 0
    nngp_error: Tensor | None = None
    ntk_error: Tensor | None = None


@torch.no_grad()
def kernel(
    spec: Layer,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    progress: Callable[[int, int], None] | None = None,
    samples: int = 512,
    generator: torch.Generator | None = None,
) -> InfiniteKernel:
    """NNGP and NTK of `spec` in the limit of infinite width, between the rows of x1 and of x2 (or x1), on their device.

    x1, x2: [n, d]; [n, T, d] tokens; [n, C, L] where the first layer that looks at positions is Conv or AvgPool;
        [n, C, H, W] images. Without x2 the result is symmetric exactly.
    progress: called with (pairs done, pairs in all) after each block.
    samples: for what has no closed form (see InfiniteKernel.samples).
    generator: asks for the Monte Carlo estimate of `SoftmaxAttention`, with an error bar from 8 replicates.

    Raises ValueError for a spec that ends with positions, meets an activation before any weights, does not fit the
    inputs' shape, or has softmax attention and no generator; TypeError for what is not a spec or not a tensor.

    Sources: Jacot et al. 2018; Lee et al. 2019; Novak et al. 2019, Arora et al. 2019 (convolutions); Hron et al. 2020.
    """
    net = spec if isinstance(spec, Serial) else Serial(spec)
    notes: set[str] = set()
    net.state(State.OTHER, notes)
    points = samples if "sampled" in notes else 0
    if MONTE_CARLO not in notes:
        return InfiniteKernel(*_evaluate(net, x1, x2, dtype, progress, points, None), points)
    if generator is None:
        raise ValueError(
            "SoftmaxAttention (softmax of 1/√d-scaled logits) has no closed form: pass generator=torch.Generator() for "
            "a Monte Carlo estimate with an error bar (samples= sets how many draws)."
        )
    return _estimate(net, x1, x2, dtype, progress, samples, points, generator)


def _estimate(
    net: Serial,
    x1: Tensor,
    x2: Tensor | None,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
    samples: int,
    points: int,
    generator: torch.Generator,
) -> InfiniteKernel:
    """The mean over independent replicates, and its standard error."""
    if samples < 2 * REPLICATES:
        raise ValueError(f"a Monte Carlo estimate needs samples >= {2 * REPLICATES}, got {samples}.")
    count, found = samples // REPLICATES, []
    for i in range(REPLICATES):
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        report = None if progress is None else _shifted(progress, i)
        found.append(torch.stack(_evaluate(net, x1, x2, dtype, report, points, Draws(seed, count))))
    runs = torch.stack(found)
    pairs = [*runs.mean(0), *(runs.std(0) / REPLICATES**0.5)]
    nngp, ntk, nngp_error, ntk_error = (_mirrored(k) for k in pairs) if x2 is None else pairs
    return InfiniteKernel(nngp, ntk, count * REPLICATES, nngp_error, ntk_error)


def _shifted(progress: Callable[[int, int], None], i: int) -> Callable[[int, int], None]:
    """Progress of replicate i among all."""
    return lambda done, total: progress(i * total + done, REPLICATES * total)


def _evaluate(
    net: Serial,
    x1: Tensor,
    x2: Tensor | None,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
    samples: int,
    draws: Draws | None,
) -> tuple[Tensor, Tensor]:
    """NNGP and NTK, block by block."""
    if x2 is not None and isinstance(x1, Tensor) and isinstance(x2, Tensor) and x1.device != x2.device:
        raise ValueError(f"x1 is on {x1.device} and x2 on {x2.device}; put both on one.")
    a = Inputs(net, x1, "x1", dtype, samples, draws)
    b = a if x2 is None else Inputs(net, x2, "x2", dtype, samples, draws)
    if a.channels.shape[:-2] != b.channels.shape[:-2] or a.channels.shape[-1] != b.channels.shape[-1]:
        raise ValueError(f"x1 and x2 differ in more than their number: {list(a.shape)} and {list(b.shape)}.")
    nngp, ntk = a.channels.new_empty(2, a.n, b.n)
    done, total = 0, a.n * (a.n + 1) // 2 if a is b else a.n * b.n
    for rows, cols in _blocks(a.n, b.n, a.entries, a.channels.device.type, symmetric=a is b):
        f = net.cross(cross_input(a, b, rows, cols), take(a.saved, rows), take(b.saved, cols), False)
        nngp[rows, cols], ntk[rows, cols] = f.nngp, 0.0 if f.ntk is None else f.ntk
        if progress is not None:
            done = min(total, done + _size(rows) * _size(cols))
            progress(done, total)
    return (_mirrored(nngp), _mirrored(ntk)) if a is b else (nngp, ntk)


class Inputs:
    """One set of inputs: channels [*S, n, C], and what the nonlinearities will need to know of each of them."""

    def __init__(
        self, net: Serial, x: Tensor, name: str, dtype: torch.dtype, samples: int, draws: Draws | None = None
    ) -> None:
        self.channels, self.positions = _channels_last(net, x, name, dtype)
        self.shape, self.n = x.shape, x.shape[0]
        self.samples, self.draws = samples, draws
        if left := net.positions(self.positions):
            raise ValueError(f"The spec ends with positions {list(left)}; add Flatten() or GlobalAvgPool().")
        self.pairs = net.pairs_in(False) and bool(self.positions)
        self.entries = max(1, _product(self.positions)) ** (2 if self.pairs else 1)
        size = max(1, _budget(x.device.type) // self.entries)
        parts = [self._field(slice(i, i + size)) for i in range(0, self.n, size)]
        self.cov = torch.cat([p.cov for p in parts], dim=-1)
        self.variance = torch.cat([p.variance for p in parts], dim=-1)
        if not torch.isfinite(self.variance).all():
            raise ValueError(f"{name} has rows whose square overflows {dtype}; rescale them.")
        self.saved: Features = join([net.own(p, False)[1] for p in parts])

    def _field(self, rows: slice) -> SelfCovariance:
        h = self.channels[..., rows, :]
        cov = h.square().mean(dim=-1) if not self.pairs else _gram(h.flatten(0, -3), self.positions)
        return SelfCovariance(cov, h.mean(dim=-1), len(self.positions), self.pairs, None, self.samples, self.draws)


def _gram(h: Tensor, positions: Positions) -> Tensor:
    """[S, n, C] -> [*S, *S', n]."""
    h = h.movedim(1, 0)
    return (h @ h.mT / h.shape[-1]).movedim(0, -1).reshape(*positions, *positions, -1).contiguous()


def cross_input(a: Inputs, b: Inputs, rows: slice, cols: slice) -> CrossKernels:
    """Kernels of the raw inputs, ⟨x, x'⟩/channels: [*S, rows, cols] or [*S, *S', rows, cols]; no NTK yet."""
    h, g = a.channels[..., rows, :], b.channels[..., cols, :]
    shape = (*a.positions, *(a.positions if a.pairs else ()), h.shape[-2], g.shape[-2])
    if a.pairs:
        h, g = h.flatten(0, -3), g.flatten(0, -3)
        k = h.flatten(0, 1) @ g.flatten(0, 1).T
        k = k.unflatten(0, h.shape[:2]).unflatten(-1, g.shape[:2]).transpose(1, 2).reshape(shape)
    else:
        k = h @ g.mT
    f = CrossKernels(k.div_(h.shape[-1]).contiguous(), None, len(a.positions), a.pairs, None, a.samples, a.draws)
    _snap(f, a.variance[..., rows], b.variance[..., cols], h.shape[-1])
    if a is b and rows.start == cols.start:
        size = min(k.shape[-2:])
        f.nngp.diagonal(dim1=-2, dim2=-1).copy_(a.cov[..., rows.start : rows.start + size])
    return f


def _snap(f: CrossKernels, qa: Tensor, qb: Tensor, channels: int) -> None:
    """Makes the cosine of parallel inputs ±1 exactly.

    A matrix product rounds differently from entry to entry. Left alone, duplicates would differ by eps here, which
    acos turns into 1.5e-8 and a chaotic network into anything, with a kernel that is no longer positive.
    """
    bound = f.left(qa) * f.right(qb)
    bound.sqrt_()
    near = f.nngp.abs() >= bound * (1 - (4 + channels**0.5) * torch.finfo(bound.dtype).eps)
    torch.where(near, bound.copysign_(f.nngp), f.nngp, out=f.nngp)


def _channels_last(net: Serial, x: Tensor, name: str, dtype: torch.dtype) -> tuple[Tensor, Positions]:
    """[*S, n, C] in `dtype`, and the positions."""
    _, positions = layout(net, x, name)
    if x.is_complex() or x.device.type == "meta":
        raise ValueError(f"{name} must hold real numbers, got {x.dtype} on {x.device}.")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} has values that are not finite; remove those rows first.")
    x = x.detach().to(dtype)
    if x.ndim == 4 or (x.ndim == 3 and channels_first(net)):
        x = x.movedim(1, -1)
    return x.movedim(0, -2).contiguous(), positions


def layout(net: Serial, x: Tensor, name: str) -> tuple[int, Positions]:
    """Channels and positions of inputs; raises where their shape is none that a kernel takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}.")
    if x.ndim not in (2, 3, 4) or 0 in x.shape:
        raise ValueError(
            f"{name} must be [n, d], [n, T, d], [n, C, L] or [n, C, H, W] and not empty, got {list(x.shape)}."
        )
    first = x.ndim == 4 or (x.ndim == 3 and bool(channels_first(net)))
    return (x.shape[1], tuple(x.shape[2:])) if first else (x.shape[-1], tuple(x.shape[1:-1]))


def channels_first(layer: Layer) -> bool | None:
    """Whether three-dimensional inputs are [n, C, L]: what the first layer that slides a window says, else None."""
    if isinstance(layer, Conv | AvgPool):
        return True
    for child in layer.layers if isinstance(layer, Serial) else layer.branches if isinstance(layer, Sum) else ():
        if (answer := channels_first(child)) is not None:
            return answer
    return None


def _blocks(n1: int, n2: int, entries: int, device: str, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Tiles of pairs within the budget; for a symmetric kernel those on and above the diagonal."""
    pairs = max(1, _budget(device) // entries)
    width = min(n2, max(64, int(pairs**0.5))) if pairs >= 64 else min(n2, pairs)
    height = min(n1, max(1, pairs // width), width if symmetric else n1)
    for i in range(0, n1, height):
        for j in range(i if symmetric else 0, n2, width):
            yield slice(i, min(i + height, n1)), slice(j, min(j + width, n2))


def _budget(device: str) -> int:
    return BLOCK_ENTRIES.get(device, BLOCK_ENTRIES["other"])


def _mirrored(k: Tensor) -> Tensor:
    return k.triu().add_(k.triu(1).T)


def _size(s: slice) -> int:
    return int(s.stop - s.start)


def _product(values: Positions) -> int:
    out = 1
    for v in values:
        out *= v
    return out

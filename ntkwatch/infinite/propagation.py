"""What a network does to signals and gradients on the way through, before any training: ordered, critical or chaotic.

χ of a layer is how much the squared gradient of a hidden unit grows per layer, w_std²·E[φ'(h)²] (Poole et al. 2016;
Schoenholz et al. 2017). Below 1 gradients vanish and different inputs become alike (ordered), above 1 gradients explode
and alike inputs part (chaotic), at 1 both keep their scale (critical). Deep networks train to a depth of about 6 ξ,
ξ = 1/|log χ|. In a residual latent, which grows, χ counts relative to that growth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ntkwatch.infinite.compose import Serial, Sum
from ntkwatch.infinite.convert import from_module
from ntkwatch.infinite.covariances import CrossKernels, Draws
from ntkwatch.infinite.kernels import Inputs, cross_input
from ntkwatch.infinite.layers import Layer, State
from ntkwatch.infinite.softmax import MONTE_CARLO
from ntkwatch.infinite.windows import Flatten

CRITICAL = 0.05  # |log χ| of a layer; less than a factor 2 over all layers is critical too
REACH = 6.0  # depths ξ that training reaches (Schoenholz et al. 2017)
SAMPLES, DRAWS = 128, 64  # of what has no closed form; enough for two digits


@dataclass(frozen=True)
class Stage:
    """The network up to a layer with weights, read out there.

    variance: mean over probes of a unit's. cosine: mean over pairs of probes. chi: gain of squared gradients since the
    stage before, None at the first. condition: λ_max/λ_min of the NTK, inf where λ_min is rounding.
    """

    name: str
    variance: float
    cosine: float
    chi: float | None
    condition: float


@dataclass(frozen=True)
class Propagation:
    """Stages in order; the last is the output. rank: of the NTK on n probes, above n·eps·λ_max."""

    stages: tuple[Stage, ...]
    rank: int
    n: int

    @property
    def hidden(self) -> int:
        """How many stages gradients pass on the way back from the readout."""
        return max(1, len(self.stages) - 2)

    @property
    def chi(self) -> float | None:
        """The geometric mean of χ over the hidden layers; None for a network without any."""
        gains = [s.chi for s in self.stages if s.chi is not None]
        gains = gains[:-1] or gains  # the readout has a scale of its own
        if not gains:
            return None
        return math.exp(sum(math.log(max(g, 1e-300)) for g in gains) / len(gains))

    @property
    def depth_scale(self) -> float:
        """ξ, in layers; inf at χ = 1 and for a network without hidden layers."""
        return math.inf if self.chi is None or self.chi == 1 else 1 / abs(math.log(self.chi))

    @property
    def phase(self) -> str:
        """ "ordered", "critical", "chaotic", or "linear" for a network without hidden layers."""
        if self.chi is None:
            return "linear"
        log = math.log(self.chi)
        still = abs(log) <= CRITICAL or abs(log) * self.hidden <= math.log(2)
        return "critical" if still else "ordered" if log < 0 else "chaotic"

    @property
    def advice(self) -> str:
        """One or two sentences: what the phase means for this depth, and whether the kernel has full rank."""
        return f"{_on_phase(self)} {_on_rank(self)}"

    def __str__(self) -> str:
        lines = [f"{'up to':<24}{'variance':>12}{'cosine':>10}{'chi':>10}{'condition':>12}"]
        for s in self.stages:
            chi = "" if s.chi is None else f"{s.chi:.3g}"
            lines.append(f"{s.name:<24}{s.variance:>12.3g}{s.cosine:>10.3f}{chi:>10}{s.condition:>12.3g}")
        return "\n".join([*lines, self.advice])


@torch.no_grad()
def signal_propagation(network: Layer | nn.Module, x: Tensor) -> Propagation:
    """Variance, correlation, χ and conditioning layer by layer, for inputs x as `kernel` takes them (16 are plenty).

    network: a spec, or a module that `from_module` converts. Conditions are those of the NTK up to each layer, on the
    mean over positions where there are some; duplicated inputs make them infinite.

    >>> from ntkwatch.infinite import Dense, Relu, Serial
    >>> net = Serial(*[Dense(2**0.5), Relu()] * 8, Dense(2**0.5))
    >>> signal_propagation(net, torch.eye(4)).phase
    'critical'

    Sources: Poole et al. 2016; Schoenholz et al. 2017; Xiao et al. 2020 (conditioning).
    """
    spec = from_module(network) if isinstance(network, nn.Module) else network
    chain = _chain(spec)
    here = [i for i, layer in enumerate(chain) if layer.mixes or isinstance(layer, Sum)]
    if not here:
        raise ValueError(f"{spec} has no layer with weights, so there is nothing to propagate.")
    kernels = _walk(Serial(*chain), x, here)
    frozen = _walk(Serial(*chain).frozen(), x, here, start=True)
    stages = []
    for j, i in enumerate(here):
        nngp, ntk = kernels[j]
        chi = None
        if j:
            gain = _mean(frozen[j][1]) / max(_mean(frozen[j - 1][1]), 1e-300)
            growth = _mean(nngp) / max(_mean(kernels[j - 1][0]), 1e-300)
            chi = gain / growth if isinstance(chain[i], Sum) and growth > 1 else gain
        stages.append(Stage(_name(chain[i], i), _mean(nngp), _cosine(nngp), chi, _condition(ntk)))
    return Propagation(tuple(stages), _rank(kernels[-1][1]), len(x))


def _walk(net: Serial, x: Tensor, here: list[int], start: bool = False) -> list[tuple[Tensor, Tensor]]:
    """(NNGP, NTK) [n, n] after the layers `here`. start: the inputs count as trained, and nothing else."""
    notes: set[str] = set()
    net.state(State.OTHER, notes)
    draws = Draws(0, DRAWS) if MONTE_CARLO in notes else None
    inputs = Inputs(net, x, "x", torch.float64, SAMPLES if "sampled" in notes else 0, draws)
    whole = slice(0, inputs.n)
    f = cross_input(inputs, inputs, whole, whole)
    f = replace(f, ntk=f.nngp.clone()) if start else f
    found = []
    for i, after in enumerate(net.stages(f, inputs.saved, inputs.saved, False)):
        if i in here:
            found.append(_read_out(after))
    return found


def _read_out(f: CrossKernels) -> tuple[Tensor, Tensor]:
    """Copies of both kernels, as `Flatten` would read them out."""
    f = Flatten().cross(f.diagonal() if f.pairs else f, (), (), False)
    return f.nngp.clone(), torch.zeros_like(f.nngp) if f.ntk is None else f.ntk.clone()


def _chain(layer: Layer) -> list[Layer]:
    """The layers of nested Serials in one row."""
    return [x for child in layer.layers for x in _chain(child)] if isinstance(layer, Serial) else [layer]


def _mean(k: Tensor) -> float:
    return float(k.diagonal().mean())


def _cosine(k: Tensor) -> float:
    """Mean over pairs; 1 for a single probe."""
    size = k.diagonal().clamp_min(0).sqrt()
    scale = size[:, None] * size
    c = torch.where(scale > 0, k / scale, torch.zeros_like(k))
    n = len(k)
    return float((c.sum() - c.diagonal().sum()) / (n * (n - 1))) if n > 1 else 1.0


def _spectrum(k: Tensor) -> tuple[Tensor, float]:
    values = torch.linalg.eigvalsh(k)
    return values, len(k) * torch.finfo(k.dtype).eps * float(values[-1])


def _condition(k: Tensor) -> float:
    values, floor = _spectrum(k)
    return float(values[-1] / values[0]) if float(values[0]) > floor else math.inf


def _rank(k: Tensor) -> int:
    values, floor = _spectrum(k)
    return int((values > floor).sum())


def _name(layer: Layer, i: int) -> str:
    return f"{i}: {type(layer).__name__}"


def _on_phase(p: Propagation) -> str:
    if p.chi is None:
        return "Linear in its inputs: nothing vanishes or explodes."
    factor = f"χ = {p.chi:.3g} a layer" if p.chi > 1e-100 else "χ = 0"
    if p.phase == "critical":
        return f"Critical ({factor}): signals and gradients keep their scale with depth."
    reach = max(1, round(REACH * p.depth_scale))
    deep = f"training reaches some {reach} such layers, and there are {p.hidden}"
    if p.phase == "ordered":
        return (
            f"Ordered ({factor}): inputs become alike and gradients vanish with depth; {deep}. Larger initial weights "
            "(Kaiming's for ReLU), normalisation or residual connections move it to the edge."
        )
    return (
        f"Chaotic ({factor}): alike inputs part and gradients explode with depth; {deep}. Smaller initial weights or "
        "normalisation move it to the edge."
    )


def _on_rank(p: Propagation) -> str:
    if p.rank < p.n:
        return (
            f"The infinite-width NTK has rank {p.rank} on {p.n} probes: {p.n - p.rank} cannot be fitted apart "
            "(look for duplicates)."
        )
    return f"The infinite-width NTK has full rank on {p.n} probes (condition number {p.stages[-1].condition:.3g})."

"""What a kernel will cost, before any of it is computed: the same answer on every machine, so that runs agree on it."""

from __future__ import annotations

from torch import Tensor

from ntkwatch.infinite.activations import Elementwise
from ntkwatch.infinite.attention import Attention
from ntkwatch.infinite.compose import Serial, Sum
from ntkwatch.infinite.kernels import layout
from ntkwatch.infinite.layers import Layer, Positions, State
from ntkwatch.infinite.quadrature import Activation
from ntkwatch.infinite.softmax import SoftmaxAttention
from ntkwatch.infinite.windows import AvgPool, Conv

PASS_SECONDS = 1.5e-9  # seconds to go over one float64 entry, on one core of 2020 or later
PASSES = 12  # over a kernel, of a closed-form activation


def nominal_seconds(spec: Layer, x: Tensor, x2: Tensor | None = None, *, samples: int = 512) -> float:
    """Seconds that `kernel(spec, x, x2)` takes on one nominal core, within a factor of a few; nothing is computed.

    x, x2: as for `kernel`; only their shapes are looked at. Raises as `kernel` does for a spec that does not fit.
    """
    net = spec if isinstance(spec, Serial) else Serial(spec)
    notes: set[str] = set()
    net.state(State.OTHER, notes)
    channels, positions = layout(net, x, "x")
    pairs = len(x) * (len(x) + 1) / 2 if x2 is None else len(x) * len(x2)
    wanted = net.pairs_in(False) and bool(positions)
    work = _entries(positions, wanted) * channels / 4
    work += _passes(net, positions, State.OTHER, False, samples)[0]
    return pairs * work * PASS_SECONDS


def _entries(positions: Positions, pairs: bool) -> float:
    out = 1.0
    for length in positions:
        out *= float(length) ** (2 if pairs else 1)
    return out


def _passes(
    layer: Layer, positions: Positions, state: State, pairs: bool, samples: int
) -> tuple[float, Positions, State]:
    """Passes over entries of one pair of inputs, then positions and state of the output."""
    if isinstance(layer, Serial):
        needs, total = layer.needs(pairs), 0.0
        for child, needed in zip(layer.layers, needs[1:], strict=True):
            work, positions, state = _passes(child, positions, state, needed, samples)
            total += work
        return total, positions, state
    if isinstance(layer, Sum):
        total = sum(_passes(b, positions, state, pairs, samples)[0] for b in layer.branches)
        return total + 4 * _entries(positions, pairs), layer.positions(positions), layer.state(state, set())
    left = layer.positions(positions)
    work = _weight(layer, positions, state, samples) * _entries(positions, layer.pairs_in(pairs))
    return work, left, layer.state(state, set())


def _weight(layer: Layer, positions: Positions, state: State, samples: int) -> float:
    """Passes over the entries of the input's kernels."""
    if isinstance(layer, Elementwise):
        one = 4.0 * layer.degree if isinstance(layer, Activation) else PASSES
        return 3 * one * samples if state is State.LATENT else one
    if isinstance(layer, Conv | AvgPool):
        size = layer.kernel_size if isinstance(layer, Conv) else layer.window
        return 2.0 * sum(size if isinstance(size, tuple) else (size,) * len(positions)) + 4
    if isinstance(layer, Attention | SoftmaxAttention):
        tokens = _entries(positions, False)
        return 4 * tokens * (6 * samples if isinstance(layer, SoftmaxAttention) else 1)
    return 4.0

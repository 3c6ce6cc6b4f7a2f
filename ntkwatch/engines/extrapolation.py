"""Predictions for a kernel of many probes from one of few: peak memory, seconds, and each parameter's rule.

The small kernel follows the steps of the large one: `scale` makes it choose groups of outputs, segments, contractions
and buffers as for the full number of probes. Every tensor counts with its size in the large kernel: kernels and
products of pairs grow with the square of the number of probes, all else linearly. The predicted peak is between 0.9 and
2 times the real one, enough to decide whether a kernel fits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ntkwatch.engines.base import Reduction, Row, entries
from ntkwatch.engines.blocks import blocks
from ntkwatch.engines.capture import Capture, Found
from ntkwatch.engines.contract import Contractor
from ntkwatch.engines.contraction_costs import choose, gram_cost, jacobian_cost
from ntkwatch.engines.factors import Dense, Factor, Outer, Rows
from ntkwatch.engines.machines import machine
from ntkwatch.engines.memory import LiveStorages, peak_bytes
from ntkwatch.engines.one_by_one import OneByOne
from ntkwatch.engines.per_output import PerOutput
from ntkwatch.engines.run import Run
from ntkwatch.model import batch_size, inputs_of, take

_PART = 4  # a small block holds a quarter of the probes of a large one …
_FEWEST = 3  # … and at least as many as distinguish layouts
_MARGIN, _MORE = 1.05, 1.2  # on the peak, for growth that is not proportional; _MORE if shapes depend on values
_CALLS = 50  # timed calls
_KEPT = 2  # reads and writes of a parameter's kernel besides its contraction


@dataclass(frozen=True)
class Extrapolation:
    """The predicted cost of a kernel of all probes.

    Attributes:
        peak: bytes beyond the model's own.
        rows: costs by parameter name.
        passes: seconds of the forward and backward passes.
        forward_flops: operations of one probe's forward pass.
        outputs: number of outputs C.
    """

    peak: int
    rows: dict[str, Row]
    passes: float
    forward_flops: float
    outputs: int


class ScaledStorages(LiveStorages):
    """Counts live bytes at their size for more probes, operations, calls, and the time spent on counting.

    Args:
        scale: the ratio of numbers of probes.
        squares: growth factors of storages that do not grow linearly (kernels), by their size in bytes.
        clock: returns seconds.
    """

    def __init__(self, scale: float, squares: dict[int, float], clock: Callable[[], float]) -> None:
        super().__init__()
        self.scale, self.flops, self.calls, self.counting = scale, 0.0, 0, 0.0
        self._squares, self._clock = squares, clock
        self._forward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        start = self._clock()
        self.calls += 1
        self.count(result, args, kwargs)
        if self._forward and func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        self.counting += self._clock() - start
        return result

    def weight(self, size: int) -> float:
        """The bytes that the storage will have in the large kernel."""
        return size * self._squares.get(size, self.scale)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Counts operations inside the context."""
        self._forward = True
        try:
            yield
        finally:
            self._forward = False

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Replaces the growth factor inside the context."""
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before


@dataclass
class SmallRun(Run):
    """A run of few probes that records the cost of its passes and contractions.

    Attributes:
        counter: counts live bytes, operations and calls.
        rows: predicted costs by parameter.
        spent: (seconds, calls) of contractions by parameter.
        grows: the ratio of costs for all probes and for few, by parameter.
    """

    counter: ScaledStorages = field(default_factory=lambda: ScaledStorages(1.0, {}, time.perf_counter))
    rows: dict[str, Row] = field(default_factory=dict)
    spent: dict[str, tuple[float, int]] = field(default_factory=dict)
    grows: dict[str, float] = field(default_factory=dict)
    name: str = ""
    dispatch: float = 0.0  # seconds that counting adds to a call

    def capture(self, block: Any) -> Capture | OneByOne:
        """As `Run.capture`; counts the operations of the forward pass."""
        with self.counter.forward():
            return super().capture(block)

    def contractor(self, reduction: Reduction, dtype: torch.dtype, same: bool) -> Contractor:
        """A contractor that times its contractions and chooses them as for all probes."""
        return _Observed(reduction, dtype, same, self.in_blocks, scale=self.scale, run=self)

    def note(self, found: Found, n: int, m: int, contract: Contractor) -> None:
        """Adds the cost of a contraction, for all probes of a pair of blocks, to its parameter's row."""
        one, reduction, dtype, same = found.factor, contract.reduction, contract.dtype, contract.same
        large = self._scaled(n), self._scaled(m)
        how, cost = choose(one, *large, reduction, dtype, same)
        small = (gram_cost if how == "gram" else jacobian_cost)(one, n, m, reduction, dtype, same)  # type: ignore[arg-type]
        kept = 0.0 if self.layers is None else float(large[0] * large[1] * entries(reduction, one.outputs))
        moved = cost.bytes + _KEPT * kept * dtype.itemsize
        old = self.rows.get(found.name, Row(found.name, "", 0.0, 0.0, 0.0))
        self.rows[found.name] = Row(found.name, f"{how}: {found.rule}", old.flops + cost.flops, old.bytes + moved, 0.0)
        self.name, self.grows[found.name] = found.name, cost.flops / max(small.flops, 1.0)

    def share(self, one: Dense, m: int, contract: Contractor) -> None:
        """Subtracts the products that a weight and its bias share from the row of the later of the two."""
        large = self._scaled(one.n), self._scaled(m)
        cost, old = jacobian_cost(one, *large, contract.reduction, contract.dtype, contract.same), self.rows[self.name]
        self.rows[self.name] = replace(old, flops=old.flops - cost.flops, bytes=old.bytes - cost.bytes)

    def _scaled(self, n: int) -> int:
        return round(n * self.scale)

    def now(self) -> float:
        """Seconds, without the time of counting."""
        return clock(self.network.device) - self.counter.counting - self.counter.calls * self.dispatch


@dataclass
class _Observed(Contractor):
    """Times each contraction; products of pairs of examples grow with the square of the number of probes."""

    run: SmallRun = field(kw_only=True)
    _pairs: float = 1.0

    def add(self, out: Tensor, one: Factor, two: Factor) -> None:
        run = self.run
        start, calls = run.now(), run.counter.calls
        super().add(out, one, two)
        seconds, count = run.spent.get(run.name, (0.0, 0))
        run.spent[run.name] = seconds + run.now() - start, count + run.counter.calls - calls

    def _gradients(self, a: PerOutput, b: PerOutput) -> Tensor:
        if (*a.place, *b.place) in self.shared:
            self.run.share(Dense(a), b.shape[0], self)
        return super()._gradients(a, b)

    def _pair_rows(self, one: Outer | Rows, pairs: int) -> int:
        size = super()._pair_rows(one, pairs)
        self._pairs = min(self.scale, self._large_pair_rows(one, pairs) / size) ** 2
        return size

    def _block(self, *args: Any) -> Tensor:
        with self.run.counter.scaled(self._pairs):
            return super()._block(*args)

    def _input_products(self, *args: Any) -> Tensor:
        with self.run.counter.scaled(self._pairs if self.reduction != "full" else self.scale):
            return super()._input_products(*args)


def clock(device: torch.device) -> float:
    """Seconds; on a CPU the thread's own time, which other processes do not affect."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def small_block(chunk: int) -> int:
    """Probes per block of a small kernel: an odd number, so that few other tensors have the size of a kernel."""
    return min(chunk, max(_FEWEST, -(-chunk // _PART) | 1))


def extrapolate(run: Run, x: Any, chunk: int) -> Extrapolation:
    """The predicted cost of `run.kernels` for x in blocks of `chunk`, from a kernel of one or two small blocks.

    Raises whatever the model raises on few probes.
    """
    n = batch_size(inputs_of(x))
    chunk, size = min(n, chunk), small_block(min(n, chunk))
    parts = _small_blocks(run, blocks(x, chunk), size)
    count, scale, device = -(-n // chunk), chunk / size, run.network.device
    cells = count * (count + 1) / (len(parts) * (len(parts) + 1))
    taken = sum(batch_size(inputs_of(part)) for part in parts)
    outputs = 1 if run.points is None else run.points.outputs
    squares = kernel_sizes(run, outputs, size, taken, scale**2, (n / taken) ** 2)
    counter = ScaledStorages(scale, squares, lambda: clock(device))
    small = SmallRun(
        run.network, run.state, run.reduction, run.precision, run.points, run.layers,
        scale=scale, counter=counter, dispatch=_dispatch_seconds(device),
    )  # fmt: skip
    with counter:
        start = small.now()
        small.kernels(parts, None)
        passes = small.now() - start - sum(seconds for seconds, _ in small.spent.values())
    rows = {name: _timed(small, row, cells) for name, row in small.rows.items()}
    calls = counter.calls - sum(number for _, number in small.spent.values())
    seconds = cells * _larger(passes, calls, scale, device)
    captured = taken * (len(parts) + 1) / 2  # each block runs again for all blocks before it
    peak = counter.peak * (_MARGIN if run.points is None or run.points.sure else _MORE)
    return Extrapolation(int(peak), rows, seconds, counter.flops / captured, small.outputs[0].shape[1])


def _small_blocks(run: Run, parts: list[Any], size: int) -> list[Any]:
    """The first probes of two blocks; if shapes depend on values, of the blocks with the largest forward passes."""
    if run.points is not None and not run.points.sure and len(parts) > 2:
        parts = sorted(parts, key=lambda part: _made(run, part), reverse=True)
    return [take(part, slice(0, size)) for part in parts[:2]]


def _made(run: Run, block: Any) -> float:
    """Peak bytes of a forward pass."""
    with torch.no_grad():
        return peak_bytes(lambda: run.network.outputs(block, run.state))


def _dispatch_seconds(device: torch.device) -> float:
    """The overhead per call of counting calls, besides the counting itself."""
    some, spent = torch.empty(0), []
    for counter in (ScaledStorages(1.0, {}, lambda: clock(device)), None):
        with counter or contextlib.nullcontext():
            start = clock(device)
            for _ in range(_CALLS):
                some.detach()
            spent.append(clock(device) - start - (0.0 if counter is None else counter.counting))
    return max(0.0, spent[0] - spent[1]) / _CALLS


def kernel_sizes(run: Run, outputs: int, size: int, count: int, pairs: float, whole: float) -> dict[int, float]:
    """Sizes in bytes of small kernels → their growth factors.

    Args:
        size: probes of a small block, whose kernels grow by `pairs`.
        count: probes of all small blocks, whose kernels grow by `whole`.
    """
    found = {}
    for each in {1, entries(run.reduction, outputs), entries(str(run.layers), outputs)}:
        for itemsize in (4, 8):
            found[each * itemsize * size**2] = pairs
            found[each * itemsize * count**2] = whole
            found[each * itemsize * count**2 * len(run.network.parameters)] = whole  # stacked over parameters
    return found


def _timed(small: SmallRun, row: Row, cells: float) -> Row:
    """The costs of a parameter in all pairs of blocks."""
    seconds, calls = small.spent.get(row.name, (0.0, 0))
    whole = _larger(seconds, calls, small.grows[row.name], small.network.device)
    return Row(row.name, row.rule, cells * row.flops, cells * row.bytes, cells * whole)


def _larger(seconds: float, calls: int, grows: float, device: torch.device) -> float:
    """The seconds for all probes, given those of few; the overhead of calls stays constant."""
    fixed = min(seconds, calls * machine(device).call)
    return fixed + (seconds - fixed) * grows

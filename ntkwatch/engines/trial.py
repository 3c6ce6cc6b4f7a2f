"""How long passes take: they are made for a few probes and timed, because no count of operations tells.

A decomposition's backward pass takes many times its forward pass, a depthwise convolution a small share of what its
arithmetic would allow, and a small model what the interpreter takes. Only a plan's seconds rest on these times: what is
decided rests on counts, and is the same from run to run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from ntkwatch.engines.run import Run
from ntkwatch.engines.separation import few
from ntkwatch.model import batch_size, inputs_of, take

_OUTPUTS = 32  # that are passed through: more take as long each
_PATIENCE = 0.25  # seconds, within which passes are made again, or for more probes
_ROUNDS = 3
_AROUND = 1e-3  # seconds that a kernel takes however small it is, its code being cold


def seconds_of_passes(run: Run, x: Any, chunk: int, most: int) -> float:
    """Of a forward pass, C backward passes and their factors, of a block of `chunk` probes, on an idle machine.

    Timed on the fewest probes, and where they take little, on up to `most`: what calls cost stays, the rest grows with
    the probes.
    """
    some = few(x)
    size = batch_size(inputs_of(some))
    first = _timed(run, some)
    larger = min(most, chunk)
    if chunk <= size:
        return first
    if larger <= size or first * larger / size > _PATIENCE:
        return first * chunk / size
    second = _timed(run, take(x, slice(0, larger)))
    return second + max(0.0, (second - first) / (larger - size)) * (chunk - larger)


def seconds_of_kernel(run: Run, x: Any, chunk: int, rounds: float, most: int) -> float:
    """Of a kernel but for its contractions: every block of x passed through, `rounds` times."""
    return _AROUND + seconds_of_passes(run, x, chunk, most) / chunk * batch_size(inputs_of(x)) * rounds


def _timed(run: Run, block: Any) -> float:
    """The median of several times, of one where it takes long; the first call of a size is not counted."""
    times = [_once(run, block)]
    while sum(times) < _PATIENCE and len(times) <= _ROUNDS:
        times.append(_once(run, block))
    return statistics.median(times[1:] or times)


def _once(run: Run, block: Any) -> float:
    """Of all outputs, from some where there are many."""
    clock = _clock(run.network.device)
    start = next(clock)
    one = run.capture(block)
    forward = next(clock)
    outputs = len(one.cotangents)
    some = min(outputs, _OUTPUTS)
    for _ in one.factors(slice(0, some)):
        pass
    return forward - start + (next(clock) - forward) * outputs / some


def _clock(device: torch.device) -> Iterator[float]:
    """Seconds: on a CPU those in which this thread runs, which is in all that is shared among threads."""
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield time.thread_time() if device.type == "cpu" else time.perf_counter()

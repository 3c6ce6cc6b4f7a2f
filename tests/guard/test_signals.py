"""A signal at any moment of a guard: all is put back at once, and nothing later, when garbage is collected."""

from __future__ import annotations

import functools
import gc
import inspect
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.guard import leave_no_trace
from tests.guard.test_guard import Everything, backward, bits, differences, model, snapshot, train_mode_forward

CODE = ("/ntkwatch/guard/", "/ntkwatch/default_device.py", "/contextlib.py", "/torch/autograd/grad_mode.py")


class Stop(BaseException):
    """As KeyboardInterrupt, and nobody else's."""


class Interrupt:
    """Raises Stop at one moment of the guard's own code and of the context managers that it stands on.

    A moment is a function's start, a line or a return, where python looks for signals; but not where a generator
    yields. `places` says where each was, so far.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.places: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._moment(frame, event, argument) if _watched(frame.f_code.co_filename) else None

    def _moment(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if event != "return" or not code.co_flags & inspect.CO_GENERATOR:
            self.places.append(f"{code.co_filename.rsplit('/', 1)[1]}:{frame.f_lineno} {code.co_name} ({event})")
            if len(self.places) - 1 == self.at:
                sys.settrace(None)
                raise Stop
        return self._moment


@functools.cache
def _watched(file: str) -> bool:
    return any(part in file for part in CODE)


class Small(nn.Module):
    """A buffer that a forward pass in training mode moves, an ordinary one and one of inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        with torch.inference_mode():
            self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            self.seen.add_(1)
        return self.norm(x)

    def state(self) -> tuple[Any, ...]:
        buffers = [bits(buffer) for buffer in self.buffers()]
        return self.training, self.norm.training, buffers, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def guarded_until(interrupt: Interrupt, net: Small) -> None:
    """A guard around a forward pass in training mode, which itself is not interrupted."""
    before = sys.gettrace()
    try:
        sys.settrace(interrupt)
        with leave_no_trace(net):
            sys.settrace(None)
            train_mode_forward(net)
            sys.settrace(interrupt)
    finally:
        sys.settrace(before)


def faults_after(interrupt: Interrupt, net: Small) -> Iterator[str]:
    """What is wrong after an interrupted guard."""
    before = net.state()
    try:
        guarded_until(interrupt, net)
        yield "the signal was swallowed"
    except Stop:
        pass
    if net.state() != before:
        yield "not all was put back"
    with torch.no_grad():
        gc.collect(0)  # what has been made since the last time
        if torch.is_grad_enabled():
            yield "a mode was put back late"


def test_a_signal_at_every_place_leaves_no_trace_now_or_later() -> None:
    """At the first and the last time that the guard comes by each."""
    net, whole = Small(), Interrupt()
    guarded_until(Interrupt(), net)  # what is done once
    guarded_until(whole, net)
    last = {place: at for at, place in enumerate(whole.places)}
    first = {place: at for at, place in reversed([*enumerate(whole.places)])}
    assert len(last) > 200, f"only {len(last)} places"
    gc.collect()
    gc.disable()
    try:
        found = []
        for at in sorted({*first.values(), *last.values()}):
            found += [f"{whole.places[at]}: {fault}" for fault in faults_after(Interrupt(at), net)]
            net.train()
    finally:
        gc.enable()
    assert not found, f"{len(found)} faults: " + "; ".join(found[:5])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_signals_at_random_moments_leave_no_trace() -> None:
    """Interrupts rain on the guard while it saves, runs and puts back; afterwards all is as before, every time."""
    net, chooser, hits = model(), random.Random(0), 0
    whole, back = durations(net)

    def stop(number: int, frame: Any) -> None:
        raise Stop

    def alarm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    old = signal.signal(signal.SIGALRM, stop)
    try:
        for round in range(200):
            before = snapshot(net)
            try:
                if round % 2:
                    alarm(chooser.uniform(0.02, 1) * whole)
                with leave_no_trace(net):
                    train_mode_forward(net)
                    backward(net)
                    if not round % 2:  # aimed at the putting back
                        alarm(chooser.uniform(0.02, 1) * back)
                alarm(0)
            except Stop:
                hits += 1
            alarm(0)
            assert not (changed := differences(before, snapshot(net))), f"after {hits} interrupts: {changed}"
    finally:
        alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert hits > 20, f"only {hits} interrupts fell inside"


def durations(net: Everything) -> tuple[float, float]:
    """Seconds of a whole guarded pass, and of the putting back: the rain falls within, on a fast machine or a slow."""
    wholes, backs = [], []
    for _ in range(9):
        start = time.perf_counter()
        with leave_no_trace(net):
            train_mode_forward(net)
            backward(net)
            middle = time.perf_counter()
        wholes.append(time.perf_counter() - start)
        backs.append(time.perf_counter() - middle)
    return statistics.median(wholes), statistics.median(backs)

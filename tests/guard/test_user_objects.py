"""State that a model keeps in objects of the user's own classes, in slots and in closures comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor
from ntkwatch.guard import leave_no_trace


class Counter:
    def __init__(self) -> None:
        self.calls, self.last = 0, torch.zeros(2)


class Slotted:
    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls, self.last = 0, torch.zeros(2)


class SlottedChild(Slotted):
    __slots__ = ("more",)


class Holder:
    def __init__(self, inner: Any) -> None:
        self.inner, self.items = inner, [inner]


class Keeping(nn.Module):
    """Counts its calls and keeps its last mean in `state`; its outputs do not depend on them."""

    def __init__(self, state: Any, find: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.state, self._find = nn.Linear(3, 2), state, find

    def forward(self, x: Tensor) -> Tensor:
        state = self._find(self.state)
        state.calls += 1
        y = self.net(x)
        state.last = y.detach().mean(0)
        return y


def own(state: Any) -> Any:
    return state


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "an object": (Counter, own),
    "slots": (Slotted, own),
    "slots of a base class": (SlottedChild, own),
    "an object in an object": (lambda: Holder(Counter()), lambda s: s.inner),
    "slots in an object": (lambda: Holder(Slotted()), lambda s: s.inner),
    "an object in a dict": (lambda: {"a": Counter()}, lambda s: s["a"]),
    "an object in a tuple in a list": (lambda: [(Counter(),)], lambda s: s[0][0]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_measurement_leaves_it_as_it_was(case: str) -> None:
    make, find = CASES[case]
    model, x = Keeping(make(), find), torch.randn(4, 3)
    model(x)
    state = find(model.state)
    last = state.last
    monitor = Monitor(model, x)
    for step in range(2):
        monitor.measure(step)
        assert state.calls == 1, case
        assert state.last is last, case


def test_new_attributes_are_taken_off_again() -> None:
    for state in (Counter(), SlottedChild()):
        model = Keeping(state, own)
        with leave_no_trace(model):
            model.state.more = 1
        assert not hasattr(model.state, "more"), type(state).__name__


def counting() -> tuple[type[nn.Module], Callable[[], int]]:
    calls = 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.net(x)

    return Net, lambda: calls


def test_a_counter_in_the_closure_of_forward_comes_back() -> None:
    kind, calls = counting()
    model = kind()
    model(torch.randn(2, 3))
    Monitor(model, torch.randn(4, 3)).measure(0)
    assert calls() == 1

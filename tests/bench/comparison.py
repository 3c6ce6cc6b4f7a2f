"""Every model × quantity of the benchmark: ours, the floor and the peers interleaved; memory; what was asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ntkwatch.engines.base import Reduction
from ntkwatch.guard import leave_no_trace
from tests.bench.engines import Ours, float64_kernel, floor
from tests.bench.peers import PEERS, Peer
from tests.bench.timing import NOT_INSTALLED, Outcome, Timer, Work, measure, peak_memory

SINGLE, DOUBLE, FLOOR, CALL = "single", "double", "floor", "whole call"
OURS = frozenset({SINGLE, DOUBLE, FLOOR})
NEURAL_TANGENTS = "neural-tangents"
Model = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


@dataclass(frozen=True)
class Asked:
    """Ratios that a cell should reach: at least `tutorial` and `peer` times faster than these, and no more than `floor`
    times the floor; double no more than `double` times single."""

    tutorial: float | None = None
    peer: float | None = None
    floor: float | None = None
    double: float | None = 2.0


ASKED: dict[tuple[str, Reduction], Asked] = {
    ("MLP n=64", "trace"): Asked(150, 4, 1.4),
    ("MLP n=64", "full"): Asked(350, 10),
    ("MLP n=256", "trace"): Asked(peer=3.5, floor=1.6),
    ("CNN n=64", "trace"): Asked(4, 1.5, 3.5),
    ("CNN n=64", "full"): Asked(2.4, 1.4, 3.5),
    ("ResNet-18 n=8", "trace"): Asked(14, 4, 2.6),
    ("ResNet-18 n=8", "full"): Asked(13, 4, 2.6),
    ("GPT n=16", "trace"): Asked(2.8, 1.4, 1.8),
    ("GPT n=16", "full"): Asked(2, 1.1, 1.8),
}
ASKED_MIB = {"MLP n=64": 60, "CNN n=64": 460, "ResNet-18 n=8": 600, "GPT n=16": 460}


@dataclass
class Memory:
    """Bytes over the model: the peak, and what `plan` says before; of seconds only that."""

    measured: int
    planned: int
    planned_seconds: float


@dataclass
class Cell:
    """One model and quantity, and what it should reach, which is asked of CPUs.

    `gpu`: seconds of ours in single precision on a GPU, None where there is none.
    """

    model: str
    quantity: Reduction
    outcomes: dict[str, Outcome]
    memory: dict[str, Memory] = field(default_factory=dict)
    gpu: float | None = None
    asked: Asked = Asked(double=None)
    asked_mib: float | None = None

    def times(self, name: str) -> float | None:
        """How many times longer than ours in single precision."""
        mine, other = self.outcomes[SINGLE], self.outcomes[name]
        return other.seconds / mine.seconds if other.right and other.seconds and mine.seconds else None

    def fastest_peer(self) -> str | None:
        """The PyTorch peer that was fastest among those that were right."""
        seconds = {p.name: o.seconds for p in PEERS if (o := self.outcomes.get(p.name)) and o.right and o.seconds}
        return min(seconds, key=seconds.__getitem__, default=None)


def quantities(name: str) -> Sequence[Reduction]:
    """What is measured of a model: what was asked of it, both of one that nothing was asked of."""
    asked: list[Reduction] = [q for m, q in ASKED if m == name]
    return asked or ("trace", "full")


def build(model: Model, device: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, data = model
    return make().eval().to(device), data().to(device)


def compare(name: str, model: Model, timer: Timer, with_peers: bool = True) -> list[Cell]:
    """The cells of one model; everything of a model is timed in turn, round by round."""
    module, x = build(model, timer.device)
    ours, todo, exact = Ours(module, x), {}, {}
    for quantity in quantities(name):
        work = {**_ours(ours, quantity), **(_peers(module, x, quantity) if with_peers else {})}
        todo |= {f"{quantity}/{key}": fn for key, fn in work.items()}
        exact |= dict.fromkeys((k for k in todo if k.startswith(quantity)), float64_kernel(module, x, quantity))
    with leave_no_trace(module):
        found = measure(todo, exact, timer, [key for key in todo if key.split("/")[1] in OURS])
    cells = [_cell(name, quantity, found) for quantity in quantities(name)]
    for cell in cells:
        if timer.device.type == "cpu":
            cell.asked = ASKED.get((name, cell.quantity), cell.asked)
            cell.asked_mib = ASKED_MIB.get(name)
        if not with_peers:
            cell.outcomes |= {p.name: Outcome(note="not run") for p in PEERS}
        with leave_no_trace(module):
            cell.memory = _memory(ours, cell.quantity, timer.device)
        cell.gpu = _gpu_seconds(model, cell, timer)
    return cells


def _ours(ours: Ours, quantity: Reduction) -> dict[str, Work]:
    apart = Ours(copy.deepcopy(ours.module), ours.x)
    return {
        FLOOR: lambda: floor(ours.module, ours.x),
        SINGLE: lambda: ours.kernel(quantity, "single"),
        DOUBLE: lambda: ours.kernel(quantity, "double"),
        CALL: lambda: apart.whole_call(quantity),
    }


def _peers(module: nn.Module, x: Tensor, quantity: Reduction) -> dict[str, Work]:
    """Each on a copy: one that fails half way may leave its hooks on the model."""
    return {p.name: _peer(p, copy.deepcopy(module), x, quantity) for p in PEERS if p.version() is not None}


def _peer(peer: Peer, module: nn.Module, x: Tensor, quantity: Reduction) -> Work:
    function = peer.trace if quantity == "trace" else peer.full
    return lambda: function(module, x)


def _cell(name: str, quantity: Reduction, found: dict[str, Outcome]) -> Cell:
    outcomes = {p.name: Outcome(note=NOT_INSTALLED) for p in PEERS}
    outcomes |= {key.split("/")[1]: outcome for key, outcome in found.items() if key.startswith(f"{quantity}/")}
    return Cell(name, quantity, outcomes)


def _memory(ours: Ours, quantity: Reduction, device: torch.device) -> dict[str, Memory]:
    found = {}
    for precision in (SINGLE, DOUBLE):
        peak, plan = peak_memory(lambda p=precision: ours.kernel(quantity, p), device), ours.plan(quantity, precision)
        found[precision] = Memory(peak, plan.peak_bytes, plan.seconds)
    return found


def _gpu_seconds(model: Model, cell: Cell, timer: Timer) -> float | None:
    if timer.device.type == "cuda":
        return cell.outcomes[SINGLE].seconds
    if not torch.cuda.is_available():
        return None
    gpu = replace(timer, device=torch.device("cuda"), clock="wall")
    module, x = build(model, gpu.device)
    ours = Ours(module, x)
    with leave_no_trace(module):
        return measure({SINGLE: lambda: ours.kernel(cell.quantity, "single")}, {}, gpu, OURS)[SINGLE].seconds

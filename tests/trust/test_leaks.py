"""Promises 15 and 16: probing leaks neither memory nor hooks, and makes a compiled model compile nothing anew."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.trust_configs import ENGINES, HOOKS, TASKS, Job, Net
from tests.support.trust_harness import Driver, MonitorProbe, Tally, fixed_probes, observe, quieten
from tests.support.trust_observe import hook_counts

MIB = 2**20
LIMIT = 3  # MiB of growth after the warm-up


def resident() -> float:
    """Resident memory of this process [MiB]; reads /proc, so Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / MIB


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def growth(engine: str, probes: int, warm_up: int) -> tuple[float, int, int, dict[str, int]]:
    """Growth of memory [MiB], of living tensors and of threads over `probes` probes, and the hooks at the end."""
    from ntkwatch.measurement.monitor import Monitor

    quieten()
    net = Net()
    monitor = Monitor(net, fixed_probes(net), engine=engine)
    for step in range(warm_up):
        monitor.measure(step)
    before = living_tensors(), resident(), threading.active_count()
    for step in range(warm_up, warm_up + probes):
        monitor.measure(step)
    after = living_tensors(), resident(), threading.active_count()
    return after[1] - before[1], after[0] - before[0], after[2] - before[2], hook_counts(net)


def run(probes: int, warm_up: int, capsys: pytest.CaptureFixture[str]) -> None:
    for engine in ENGINES:
        memory, tensors, threads, hooks = growth(engine, probes, warm_up)
        with capsys.disabled():
            print(
                f"\npromise 15, {engine}: {probes} probes, RSS {memory:+.1f} MiB, {tensors:+d} tensors, hooks {hooks}"
            )
        assert hooks == {}
        assert threads == 0
        assert tensors <= 0, "tensors are kept"
        assert memory < LIMIT


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_probes_leak_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(150, 50, capsys)


@pytest.mark.soak
def test_three_thousand_probes_leak_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(3000, 200, capsys)


def compiled_whole(import_name: str) -> Any:
    return TASKS[import_name]()


def compiled_net(import_name: str) -> Any:
    return TASKS[import_name](net=torch.compile(Net(), backend="aot_eager"))


def compiled_in_place(import_name: str) -> Any:
    net = Net()
    net.compile(backend="aot_eager")
    return TASKS[import_name](net=net)


def compiled_function(import_name: str) -> Any:
    net = Net()
    net.forward = torch.compile(net.forward, backend="aot_eager")
    return TASKS[import_name](net=net)


WAYS: dict[str, tuple[Callable[[str], Any], bool]] = {
    "torch.compile(LightningModule)": (compiled_whole, True),
    "torch.compile(net)": (compiled_net, False),
    "net.compile()": (compiled_in_place, False),
    "forward = torch.compile(forward)": (compiled_function, False),
}


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fresh(build: Callable[[str], Any]) -> Callable[[str], nn.Module]:
    """`build` with the compiler's caches and counters cleared, so that two runs count alike."""

    def clean(import_name: str) -> nn.Module:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return build(import_name)

    return clean


def counted(build: Callable[[str], Any], whole: bool, watch: Callable[[], list[Any]]) -> tuple[Any, int]:
    seen = observe(Job("compiled", fresh(build), compiled=whole), watch=watch)
    return seen, graphs()


def test_a_compiled_model_compiles_nothing_anew(capsys: pytest.CaptureFixture[str]) -> None:
    tally, new = Tally(), 0
    for i, (way, (build, whole)) in enumerate(WAYS.items()):
        unwatched, expected = counted(build, whole, list)
        assert expected > 0, f"{way}: nothing was compiled"
        for j, engine in enumerate(ENGINES):
            probe, hook = MonitorProbe(engine), HOOKS[(i + 3 * j) % 4]
            seen, found = counted(build, whole, lambda hook=hook, probe=probe: [Driver(hook, probe)])
            name = f"{way} × {hook} × {engine}"
            tally.compare(name, unwatched, seen)
            assert probe.missing() is None, f"{name}: {probe.missing()}"
            assert found == expected, f"{name}: {found - expected} new graphs"
            new += found - expected
    with capsys.disabled():
        print(f"\npromise 16: {tally.cells} runs of compiled models, {new} new graphs, {len(tally.differ)} differ")
    assert tally.faults() == ""
    assert tally.cells == len(WAYS) * len(ENGINES)

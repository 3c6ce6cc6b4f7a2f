"""Promises 17 and 18: memory is predicted, and a kernel fits into what there is or says that it does not."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkwatch
from ntkwatch import Monitor
from ntkwatch.engines import empirical_ntk, layer_ntks, layerwise, memory, plan, planning, sign_ntk
from ntkwatch.engines.extrapolation import extrapolate
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.run import Run
from ntkwatch.model import Network, batch_size, inputs_of, take
from tests.support import SUPPORT, memory_models
from tests.support.device import placed
from tests.support.memory_models import MODELS, REDUCTIONS, mlp

SLOW = ("ResNet-18", "LSTM", "GroupNorm CNN", "ConvTranspose", "weight-tied", "depthwise")
CELLS = [(name, reduction) for name in MODELS for reduction in REDUCTIONS]
FEW = [cell for cell in random.Random(0).sample(CELLS, 12) if cell[0] not in SLOW][:4]
RSS = 64 << 20  # what the C library's heap may hold on to beyond the tensors alive at once
MIB = 1 << 20


def row(name: str, reduction: str, found: dict[str, int]) -> str:
    off = found["predicted"] / found["counted"] - 1
    resident = f"{found['resident'] / MIB:9.1f}" if "resident" in found else ""
    sizes = f"{found['predicted'] / MIB:9.1f} {found['counted'] / MIB:9.1f}"
    return f"{name:20s} {reduction:6s} {sizes} {off:+7.1%} {resident}"


def check(rows: dict[tuple[str, str], dict[str, int]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print("\npromise 17, MiB over the model\nmodel                reduction predicted   counted     off  resident")
        for (name, reduction), found in rows.items():
            print(row(name, reduction, found))
    for (name, reduction), found in rows.items():
        ratio = found["predicted"] / found["counted"]
        assert 0.9 <= ratio <= 2, f"{name}, {reduction}: predicted {found['predicted']}, was {found['counted']}"


def test_there_are_fifteen_models() -> None:
    assert len(MODELS) >= 15


def test_a_kernel_that_is_not_predicted_takes_no_more_than_is_allowed() -> None:
    """Far below the limit a kernel is begun without a prediction, by what it roughly takes."""
    for name in MODELS:
        module, x = memory_models.build(name)
        network, engine, n = Network(module), Layerwise(uncoupled=True), batch_size(inputs_of(x))
        run = Run(network, None, "full", "double", engine.points(network, x, None), None)
        most = layerwise.ROUGHLY * run.rough(n) + layerwise.WORKSPACE
        peak = extrapolate(run, x, n).peak
        assert peak <= most, f"{name}: {peak / MIB:.0f} MiB, where {most / MIB:.0f} were allowed"


def test_a_usual_kernel_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gigabytes free no small kernel is computed."""
    module, x = memory_models.build("GPT")
    network, engine = Network(module), Layerwise(uncoupled=True)
    run = Run(network, None, "trace", "double", engine.points(network, x, None), None)
    monkeypatch.setattr(layerwise, "extrapolate", lambda *args: pytest.fail("a small kernel was computed"))
    monkeypatch.setattr(layerwise, "limit_bytes", lambda device: 4 << 30)
    assert engine.chunk(run, x) == 16


def test_peak_memory_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    check({cell: memory_models.predicted_and_counted(*cell) for cell in FEW}, capsys)


KEPT = [("MLP", "trace", "trace"), ("embedding", "trace", "full"), ("conv1d", "full", "trace"), ("GPT", "sum", "trace")]


def check_kept(cells: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        (name, f"{reduction}, layers {layers}"): memory_models.predicted_and_counted(name, reduction, layers)
        for name, reduction, layers in cells
    }
    check(found, capsys)


def test_peak_memory_is_predicted_with_a_kernel_per_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    check_kept(KEPT, capsys)


# Linear layers, whose biases leave products to their weights: the model, reduction, that of kernels per parameter, how.
SHARED: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("MLP", "sum", None, {}), ("MLP", "sum", "sum", {}), ("MLP", "trace", None, {"n": 32}),
    ("MLP", "full", "trace", {"n": 6, "chunk_size": 2}), ("wide output", "sum", None, {}),
    ("wide output", "blocks", None, {"n": 8, "chunk_size": 3}), ("MLP", "trace", None, {"n": 4, "chunk_size": 1}),
    ("LayerNorm MLP", "sum", None, {"n": 64}),
]  # fmt: skip


def test_peak_memory_of_linear_layers_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    check_values(SHARED, capsys)


@pytest.mark.soak
def test_peak_memory_is_predicted_of_every_model_with_kernels_per_parameter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_kept([(name, reduction, "trace") for name, reduction in CELLS], capsys)


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads resident memory from /proc")
def test_peak_memory_is_predicted_of_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {cell: measured(*cell) for cell in CELLS}
    check(rows, capsys)
    for cell, found in rows.items():
        assert found["resident"] < 1.1 * found["counted"] + RSS, f"{cell}: memory that no tensor holds"


# Of models whose shapes depend on values: the model, reduction, that of kernels per parameter, and how.
VALUES: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("pruned", "full", "trace", {"chunk_size": 24}), ("token dropping", "full", None, {"precision": "single"}),
    ("token dropping", "trace", "trace", {"n": 11, "chunk_size": 5}), ("experts", "trace", None, {"n": 9}),
    ("experts", "full", "full", {"n": 10, "chunk_size": 4}), ("ragged", "trace", "trace", {"n": 40, "chunk_size": 9}),
    ("packed", "full", None, {"n": 7}), ("distinct words", "blocks", None, {"chunk_size": 4}),
    ("packed", "full", None, {"n": 3, "chunk_size": 1}), ("ragged", "full", None, {"n": 7, "chunk_size": 1}),
    ("ragged", "full", None, {"n": 1}), ("experts", "sum", "sum", {"n": 7, "chunk_size": 1}),
]  # fmt: skip


def check_values(cells: list[tuple[str, str, str | None, dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        (name, f"{reduction}, layers {layers}, {how}"): memory_models.predicted_and_counted(
            name, reduction, layers, **how
        )
        for name, reduction, layers, how in cells
    }
    check(found, capsys)


def test_peak_memory_is_predicted_where_shapes_depend_on_values(capsys: pytest.CaptureFixture[str]) -> None:
    check_values(VALUES, capsys)


@pytest.mark.soak
def test_peak_memory_is_predicted_where_shapes_depend_on_values_in_every_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ways = itertools.product(
        memory_models.BY_VALUES, ("trace", "full", "blocks"), (None, "trace"), (1, 2, 3, 7, 12, 64), (2, 3, 5, None),
        ("single", "double"),
    )  # fmt: skip
    cells = [
        (name, reduction, layers, {"n": n, "chunk_size": chunk, "precision": precision})
        for name, reduction, layers, n, chunk, precision in ways
        if chunk is None or chunk < n
    ]
    check_values(random.Random(1).sample(cells, 150), capsys)


class Unseen(torch.nn.Module):
    """Reads values behind torch's back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(64, 128), torch.nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.detach().cpu().numpy() > 0
        return self.b(self.a(x * torch.from_numpy(kept).to(x)).tanh())


@pytest.mark.parametrize("name", [*memory_models.BY_VALUES, "unseen"])
def test_a_measured_peak_has_no_note(name: str) -> None:
    module, x = placed(Unseen().eval(), torch.randn(48, 64)) if name == "unseen" else memory_models.build(name)
    assert plan(module, take(x, slice(0, 16))).notes == (), name


def test_a_model_that_takes_no_few_probes_has_a_rough_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; the kernel itself is the same, and its blocks are chosen by the estimate."""
    module, x = placed(mlp(64, 2).eval(), torch.randn(48, 784))
    right = empirical_ntk(module, x)

    def refused(*args: Any) -> None:
        raise RuntimeError("batches of 48 only")

    for asking in (layerwise, planning):
        monkeypatch.setattr(asking, "extrapolate", refused)
    found = plan(module, x)
    assert found.notes == ("Peak memory could not be measured on smaller batches; it is a rough estimate.",)
    counted = memory.peak_bytes(lambda: Layerwise(uncoupled=True).kernel(Network(module), x, layers=None))
    assert counted <= 4 * found.peak_bytes
    assert found.rows() == []
    monkeypatch.setattr(layerwise, "limit_bytes", lambda device: found.peak_bytes // 2)
    assert plan(module, x).chunk_size < 48
    assert (empirical_ntk(module, x) - right).norm() < 1e-5 * right.norm()


class Starved(nn.Module):
    """Memory runs out wherever there is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.a(x)


ASKED: dict[str, tuple[Callable[[nn.Module, Tensor], Any], bool]] = {  # whether it takes params=
    "empirical_ntk": (empirical_ntk, True),
    "layer_ntks": (layer_ntks, True),
    "sign_ntk": (sign_ntk, True),
    "plan": (plan, True),
    "Monitor": (lambda model, x: Monitor(model, x).measure(0), False),
}


@pytest.mark.parametrize("name", ASKED)
def test_who_runs_out_of_memory_is_told_of_the_arguments_that_there_are(name: str) -> None:
    ask, takes_params = ASKED[name]
    with pytest.raises(MemoryError) as caught:
        ask(Starved(), torch.randn(5, 4))
    said, arguments = str(caught.value), set(inspect.signature(getattr(ntkwatch, name, sign_ntk)).parameters)
    assert "raise the memory limit" in said, said
    assert ("params=" in said) == takes_params, said
    named = set(re.findall(r"(\w+)=", said))
    assert named <= arguments, f"{name} takes no {named - arguments}: {said}"


def test_a_small_kernel_takes_no_more_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even a part of the probes may take too much, the rough estimate decides."""
    module, x = memory_models.build("GPT")
    network, engine = Network(module), Layerwise(uncoupled=True)
    run = Run(network, None, "trace", "double", engine.points(network, x, None), None)
    monkeypatch.setattr(layerwise, "limit_bytes", lambda device: 33 << 20)
    assert memory.peak_bytes(lambda: engine.chunk(run, x)) <= 33 << 20


# Of the functional engine: the model, reduction, that of kernels per parameter, probes per block.
BLOCKS = {name: -(-n // 3) for name, n in memory_models.TO_TORCH_FUNC.items()}  # three, or more with a short last one
FUNCTIONAL = [
    ("CNN", "trace", None, None), ("CNN", "full", "trace", 2), ("depthwise", "trace", "trace", 3),
    ("conv1d", "sum", None, 1), ("GroupNorm CNN", "blocks", "trace", 3), ("switched", "trace", None, None),
    ("pruned", "full", None, 2), ("pruned", "trace", None, None), ("TransformerEncoder", "trace", None, 3),
]  # fmt: skip


def check_functional(cells: list[tuple[str, str, str | None, int | None]], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {
        (name, f"{reduction}, layers {layers}, blocks of {chunk}"): (
            memory_models.functional_predicted_and_counted(name, reduction, layers, chunk)
        )
        for name, reduction, layers, chunk in cells
    }
    check(rows, capsys)


def test_peak_memory_of_the_functional_engine_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    check_functional(FUNCTIONAL, capsys)


@pytest.mark.soak
def test_peak_memory_of_the_functional_engine_is_predicted_of_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    ways = [("trace", None), ("full", "trace"), ("blocks", None), ("sum", "sum")]
    check_functional(
        [(name, *way, chunk) for name, split in BLOCKS.items() for way in ways for chunk in (None, split, 1)], capsys
    )


def measured(name: str, reduction: str) -> dict[str, int]:
    """In a process of its own, whose C library gives large blocks back at once."""
    command = [sys.executable, str(SUPPORT / "memory_models.py"), name, reduction]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    return dict(json.loads(done.stdout.splitlines()[-1]))


LIMITS = (2000, 1000, 500, 400, 300, 200, 150, 100, 80, 60, 40, 10)  # MiB beyond what the process has mapped


def limited(mib: int, file: Path, blind: bool) -> dict[str, Any]:
    command = [sys.executable, str(SUPPORT / "memory_limits.py"), "MLP", "full", str(mib), str(file)]
    done = subprocess.run([*command, *(["blind"] if blind else [])], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{mib} MiB, {'blind' if blind else 'seeing'}: {done.stderr[-500:]}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def sweep(limits: tuple[int, ...], blind: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, x = memory_models.build("MLP")
    right = empirical_ntk(module, x, reduction="full")
    refused = []
    for mib in limits:
        file = folder / f"{mib}.pt"
        found = limited(mib, file, blind)
        with capsys.disabled():
            outcome = found["error"][:70] or f"{found['chunk']} probes a block, {found['seconds']:.1f} s"
            print(f"\npromise 18, {mib} MiB of address space{', not told of it' if blind else ''}: {outcome}", end="")
        if found["error"]:
            refused.append(mib)
            assert "raise the memory limit" in found["error"], f"{mib} MiB: {found['error']}"
        else:
            off = float((torch.load(file) - right).norm() / right.norm())
            assert off < 1e-5, f"{mib} MiB, {found['chunk']} probes a block: off by {off:.1e}"
    most = 60 if blind else 40  # told of its limit, ten of them finish
    assert all(mib <= most for mib in refused), f"refused at {refused} MiB"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_limited_address_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep((300, 10), False, tmp_path, capsys)
    sweep((150,), True, tmp_path, capsys)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("blind", [False, True])
def test_limited_address_space_sweep(blind: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(mib >= 60 for mib in LIMITS) == 10
    sweep(LIMITS, blind, tmp_path, capsys)


def test_wide_trace_stays_under_a_gigabyte() -> None:
    found = plan(mlp(), torch.randn(512, 784))
    assert found.peak_bytes < 1 << 30, f"{found.peak_bytes / MIB:.0f} MiB at n = 512"

"""What only a GPU shows: memory as its allocator counts it, synchronisation, its generators, TF32, its own trainers."""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, NTKWatch, load_run
from ntkwatch.engines import empirical_ntk, plan
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.support.memory_models import MODELS, REDUCTIONS, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: unmeasured here")
GPU = torch.device("cuda")
MIB = 1 << 20
WORKSPACES = 96 * MIB  # of cuBLAS and cuDNN, which torch's allocator gives and `plan` does not foresee


def on_gpu(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module, x = MODELS[name]()
    return module.eval().to(GPU), ({k: v.to(GPU) for k, v in x.items()} if isinstance(x, dict) else x.to(GPU))


def measured(name: str, reduction: Any) -> tuple[int, int]:
    """Bytes that `plan` foretells, and that the allocator gave at most during a kernel."""
    module, x = on_gpu(name)
    network, engine = Network(module), Layerwise()
    run = lambda: engine.kernel(network, x, reduction=reduction, layers=None)  # noqa: E731
    with leave_no_trace(module):
        run()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
    return plan(module, x, reduction=reduction).peak_bytes, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_peak_memory_is_predicted(name: str, reduction: str, capsys: pytest.CaptureFixture[str]) -> None:
    predicted, peak = measured(name, reduction)
    with capsys.disabled():
        print(f"\npromise 17 on a GPU, {name}, {reduction}: predicted {predicted / MIB:.1f}, was {peak / MIB:.1f} MiB")
    assert predicted <= 1.15 * peak
    assert peak <= 1.15 * predicted + WORKSPACES


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """Caps what this process may take of the GPU, beyond what it holds."""
    total = torch.cuda.get_device_properties(GPU).total_memory

    def cap(size: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("mib", [600, 400, 300, 250, 200])
def test_little_memory_halves_the_blocks(mib: int, little_memory: Callable[[int], None]) -> None:
    module, x = placed_mlp(256)
    right = empirical_ntk(module, x, reduction="full").cpu()
    little_memory(mib * MIB)
    assert plan(module, x, reduction="full").chunk_size < 256, "the limit is seen before it is run into"
    found = empirical_ntk(module, x, reduction="full").cpu()
    assert float((found - right).norm() / right.norm()) < 1e-5, f"{mib} MiB"


def placed_mlp(n: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp().eval().to(GPU), torch.randn(n, 784, device=GPU)


def syncs(run: Callable[[], object]) -> int:
    """How often the CPU waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


@pytest.mark.parametrize("name", ["MLP", "CNN", "ResNet-18", "GPT", "LSTM", "GRU", "TransformerEncoder", "embedding"])
def test_a_kernel_waits_for_the_gpu_no_more_than_it_must(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, x = on_gpu(name)
    network, engine = Network(module), Layerwise()
    for reduction in REDUCTIONS:
        with leave_no_trace(module):
            run = lambda r=reduction: engine.kernel(network, x, reduction=r, layers=None)  # noqa: E731
            run()
            waited = syncs(run)
        with capsys.disabled():
            print(f"\n{name}, {reduction}: waits {waited} times for the GPU")
        assert waited <= 3, f"{name}, {reduction}"


def test_tf32_and_autocast_do_not_reach_a_kernel() -> None:
    for name in ("MLP", "CNN"):
        module, x = on_gpu(name)
        x = x[:8]
        right = empirical_ntk(module, x)
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            with torch.autocast("cuda", dtype=torch.bfloat16):
                found = empirical_ntk(module, x)
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        assert float((found - right).norm() / right.norm()) < 1e-6, name


class Task(pl.LightningModule):
    """A small net with what a careless probe disturbs on a GPU: dropout, batch norm, noise of its own."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 36, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x + 0.1 * torch.randn_like(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fitted(tmp_path: Path, callbacks: list[Any], net: nn.Module | None = None, **trainer: Any) -> dict[str, Tensor]:
    """All that a run on the GPU ends with: weights, moments, the GPU's generator."""
    pl.seed_everything(0, verbose=False)
    data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 3)
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True)
    task = Task(net)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = pl.Trainer(
        accelerator="gpu", devices=1, max_epochs=4, callbacks=callbacks, default_root_dir=tmp_path, logger=False,
        **quiet, **trainer,
    )  # fmt: skip
    fit.fit(task, loader)
    end = {k: v.detach().clone() for k, v in task.state_dict().items()}
    moments = fit.optimizers[0].state_dict()["state"]
    end |= {f"{i}/{k}": v for i, each in moments.items() for k, v in each.items()}
    return {**end, "cuda generator": torch.cuda.get_rng_state(), "cpu generator": torch.get_rng_state()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_a_run_on_a_gpu_is_the_same_watched(precision: Any, tmp_path: Path) -> None:
    alone = fitted(tmp_path, [], precision=precision)
    watch = NTKWatch(probes="train", every=3, budget=None)
    watched = fitted(tmp_path, [watch], precision=precision)
    assert {k for k in alone if not torch.equal(alone[k], watched[k])} == set(), precision
    assert watch.record is not None
    steps = load_run(watch.record).steps
    assert len(steps) >= 4, f"{precision}: recorded {steps}"


class Recurrent(nn.Module):
    """cuDNN keeps the state of its dropout, and makes a new one once the generator has been set."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(8, 16, 2, dropout=0.2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.squeeze(1))[0][:, -1])


def test_the_dropout_of_a_recurrent_layer_is_the_same_watched(tmp_path: Path) -> None:
    watch = NTKWatch(probes="train", every=1, budget=None)
    alone, again, watched = (fitted(tmp_path, callbacks, Recurrent()) for callbacks in ([], [], [watch]))
    same = {k for k in alone if torch.equal(alone[k], again[k])}  # cuDNN's sums may differ from run to run
    assert "cuda generator" in same
    assert {k for k in same if not torch.equal(alone[k], watched[k])} == set()


ON_THE_CPU = """
import torch
from ntkwatch import Monitor, plan
net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(8, 4)
monitor = Monitor(net, (x, torch.arange(8) % 2), diagnostics="full", loss=torch.nn.functional.cross_entropy)
print(len(monitor.measure(0).metrics), plan(net, x).engine, torch.cuda.is_initialized())
"""


def test_a_model_on_the_cpu_leaves_the_gpu_alone() -> None:
    """A process that has started CUDA cannot fork its loaders. (A Trainer starts it of its own accord.)"""
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("precision", ["single", "double"])
def test_many_probes_keep_nothing(precision: Any) -> None:
    module, x = placed_mlp(16)
    for _ in range(5):
        empirical_ntk(module, x, precision=precision)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        empirical_ntk(module, x, precision=precision)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


def test_kernels_stay_on_the_gpu() -> None:
    module, x = placed_mlp(6)
    for engine in ("layerwise", "functional"):
        assert empirical_ntk(module, x, engine=engine).is_cuda, engine  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_a_model_that_moves_between_probes_is_compared_with_its_baseline(engine: str) -> None:
    """Statistics and θ_0 follow the model to the GPU and back."""
    x, y = torch.randn(12, 5), torch.arange(12) % 3
    found = []
    for places in (["cpu"] * 3, ["cpu", "cuda", "cuda"], ["cuda", "cpu", "cuda"]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
        monitor = Monitor(model, (x, y), engine=engine, diagnostics="full", loss=nn.functional.cross_entropy)
        for step, place in enumerate(places):
            model.eval().to(place)
            last = monitor.measure(step).metrics
            optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
            nn.functional.cross_entropy(model(x.to(place)), y.to(place)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: value for name, value in last.items() if name != "overhead"})
    for name, value in found[0].items():
        for moved in found[1:]:
            assert moved[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name

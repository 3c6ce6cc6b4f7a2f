"""Speed of the layerwise engine against the tutorial's contraction and against one forward + C activation backwards.

    python tests/bench/engines.py [--models MLP CNN] [--rounds 5] [--threads 2] [--device cpu] [--no-tutorial]

Everything of one model is timed interleaved in one process; medians and ratios; agreement against float64 layerwise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from models import MODELS

from ntkwatch.engines.graph import edges, rearranges, walk
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = time.perf_counter


def tutorial(module: nn.Module, x: Tensor, reduction: str) -> Tensor:
    """The idea of PyTorch's tutorial: vmap(jacrev) of the functional model, contracted per parameter by einsum."""
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def f(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (one[None],))[0]

    j = torch.func.vmap(torch.func.jacrev(f), (None, 0))(parameters, x)
    flat = [t.flatten(2) for t in j.values()]
    if reduction == "trace":
        return sum(torch.einsum("ncp,mcp->nm", t, t) for t in flat) / flat[0].shape[1]  # type: ignore[return-value]
    return sum(torch.einsum("ncp,mdp->ncmd", t, t) for t in flat)  # type: ignore[return-value]


def floor(module: nn.Module, x: Tensor) -> None:
    """One forward and C backward passes to every layer's output."""
    parameters = dict(module.named_parameters())
    f = module(x)
    graph = walk(f, parameters)
    above = {n: None for leaf in graph.leaves.values() for n, _ in graph.consumers[leaf]}
    above = {n: None for m in above for n in ([c for c, _ in graph.consumers[m]] if rearranges(m) else [m])}
    wanted = edges(graph, list(above))
    for c in range(f.shape[1]):
        torch.autograd.grad([f[:, c].sum()], wanted, retain_graph=True)


def interleaved(work: dict[str, Callable[[], object]], rounds: int, sync: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each, taken in turn; one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, fn in work.items():
            sync()
            start = clock()
            fn()
            sync()
            if i:
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def bench(name: str, rounds: int, device: str, with_tutorial: bool) -> None:
    torch.manual_seed(0)
    make, data = MODELS[name]
    module, x = make().eval().to(device), data().to(device)
    network, engine = Network(module), Layerwise()
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def run(reduction: str, precision: str) -> Tensor:
        return engine.kernel(network, x, reduction=reduction, layers=None, precision=precision).value  # type: ignore

    work: dict[str, Callable[[], object]] = {"floor": lambda: floor(module, x)}
    for reduction in ("trace", "full"):
        for precision in ("single", "double"):
            work[f"{reduction} {precision}"] = lambda r=reduction, p=precision: run(r, p)
    with leave_no_trace(module):
        times = interleaved(work, rounds, sync)
        if with_tutorial and name != "MLP n=256":
            for reduction in ("trace", "full"):
                times[f"{reduction} tutorial"] = interleaved(
                    {"t": lambda r=reduction: tutorial(module, x, r)}, max(1, rounds // 3), sync
                )["t"]
        exact_module = make()
        exact_module.load_state_dict(module.state_dict())
        exact = Layerwise().kernel(
            Network(exact_module.double().eval()), x.double() if x.is_floating_point() else x, layers=None
        )
        errors = {p: float((run("trace", p) - exact.value).norm() / exact.value.norm()) for p in ("single", "double")}
    line = [f"{name:14s} floor {times['floor']:.4f}"]
    for reduction in ("trace", "full"):
        single, double = times[f"{reduction} single"], times[f"{reduction} double"]
        t = times.get(f"{reduction} tutorial")
        line.append(
            f"| {reduction}: single {single:.4f} = {single / times['floor']:.2f}x floor, double {double:.4f}"
            f" = {double / single:.2f}x single" + (f", tutorial {t:.3f} = {t / single:.1f}x" if t else "")
        )
    print(*line, f"| error single {errors['single']:.1e} double {errors['double']:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-tutorial", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    globals()["clock"] = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    for name in MODELS:
        if not args.models or any(name.startswith(m) for m in args.models):
            bench(name, args.rounds, args.device, not args.no_tutorial)


if __name__ == "__main__":
    main()

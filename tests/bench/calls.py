"""What whole calls take, as a user makes them, beside the kernel that they compute.

    python -m tests.bench.calls [--models NAME …] [--precision single|double] [--rounds N]

One row a model: the kernel alone (the engine, its choice made); in kernels, the first `empirical_ntk` on a fresh model,
the second, and `plan`; in kernels of the monitor's own (double precision, one for each parameter), the first and a
later `Monitor.measure`. Floors are one forward and C backward passes; the tutorial is vmap(jacrev). Medians of rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ntkwatch
from ntkwatch.engines import plan
from ntkwatch.engines.auto import choose
from ntkwatch.engines.graph import edges, rearranges, walk
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network
from tests.bench.engines import floor
from tests.bench.models import GPT, cnn, mlp, resnet18
from tests.bench.peers import tutorial_trace

Made = tuple[nn.Module, Any]


def bert_small() -> Made:
    """BERT-small with a classification head: n = 32, T = 64, C = 2."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048)
    model = BertForSequenceClassification(config)
    ids = torch.randint(5, 30000, (32, 64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gpt2(n: int = 16, length: int = 128) -> Made:
    """GPT-2 small with a classification head, pooled at the last token."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(GPT2Config(pad_token_id=0, num_labels=2))
    return model, {"input_ids": torch.randint(1, 50000, (n, length))}


MODELS: dict[str, Callable[[], Made]] = {
    "MLP": lambda: (mlp(), torch.randn(64, 784)),
    "CNN": lambda: (cnn(), torch.randn(16, 3, 32, 32)),
    "ResNet-18": lambda: (resnet18(), torch.randn(8, 3, 32, 32)),
    "GPT": lambda: (GPT(), torch.randint(0, 256, (16, 64))),
    "BERT-small": bert_small,
    "GPT-2 small": gpt2,
}
MONITORS = "monitor's kernel"  # in double precision, with a kernel per parameter
PEERED = {"MLP", "CNN", "ResNet-18", "GPT"}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(name: str, precision: Any, rounds: int) -> dict[str, float]:
    """Medians in seconds."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model.eval()
    found: dict[str, list[float]] = {}

    def note(what: str, work: Callable[[], object]) -> None:
        found.setdefault(what, []).append(seconds(work))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Network(model)
        with leave_no_trace(model):
            batch = network.batch(x)
            engine = choose(network, batch, "auto").engine

        def kernel() -> None:
            with leave_no_trace(model):
                engine.kernel(network, batch, reduction="trace", layers=None, precision=precision)

        def monitors_kernel() -> None:
            with leave_no_trace(model):
                engine.kernel(network, batch, reduction="trace", layers="trace")

        kernel()
        ntkwatch.empirical_ntk(model, x, precision=precision)
        monitor = ntkwatch.Monitor(model, x)
        note("first measure", lambda: monitor.measure(0))
        for step in range(1, rounds + 1):
            fresh = copy.deepcopy(model)
            note("first call", lambda fresh=fresh: ntkwatch.empirical_ntk(fresh, x, precision=precision))
            del fresh
            note("kernel", kernel)
            note(MONITORS, monitors_kernel)
            note("second call", lambda: ntkwatch.empirical_ntk(model, x, precision=precision))
            note("plan", lambda: plan(model, x, precision=precision))
            note("measure", lambda step=step: monitor.measure(step))
            if isinstance(x, Tensor) and name in PEERED:
                note("floor", lambda: floor(model, x))
                note("tutorial", lambda: tutorial_trace(model, x))
            else:
                note("floor", lambda: _floor(network, batch))
    return {what: statistics.median(times) for what, times in found.items()}


def _floor(network: Network, batch: Any) -> None:
    """One forward and C backward passes to the activations alone."""
    f = network.outputs(batch)
    graph = walk(f, network.parameters)
    above = {node: None for leaf in graph.leaves.values() for node, _ in graph.consumers[leaf]}
    above = {n: None for m in above for n in ([c for c, _ in graph.consumers[m]] if rearranges(m) else [m])}
    wanted = edges(graph, list(above))
    for c in range(f.shape[1]):
        torch.autograd.grad([f[:, c].sum()], wanted, retain_graph=True, allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--precision", default="single", choices=["single", "double"])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    names = ["first call", "second call", "plan", "first measure", "measure"]
    print(f"{'':12} {'kernel, ms':>10} {'floors':>7}", *(f"{name:>13}" for name in names), f"{'tutorial/2nd':>13}")
    for name in asked.models:
        found = row(name, asked.precision, asked.rounds)
        k, own = found["kernel"], found[MONITORS]
        ratios = [found[each] / (own if "measure" in each else k) for each in names]
        peer = found["tutorial"] / found["second call"] if "tutorial" in found else float("nan")
        columns = "".join(f"{each:14.2f}" for each in (*ratios, peer))
        print(f"{name:12} {1000 * k:10.1f} {k / found['floor']:7.2f}{columns}", flush=True)


if __name__ == "__main__":
    main()

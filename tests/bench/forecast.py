"""What the linear forecast costs: process time of its step over that of the run's own training step.

    python -m tests.bench.forecast [--rounds 7] [--optimizer Adam]

One thread, float32, cross-entropy, in evaluation mode, a training step and a forecast's step in turn; medians. What a
follower adds in a Trainer (the weights told from others before and after each step) is counted with the forecast.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ntkwatch.linearized.forecast import LinearForecast
from tests.bench.models import MODELS, QUICK
from tests.bench.timing import Timer

Models = Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]]


def ratio(make: Callable[[], nn.Module], inputs: Callable[[], Tensor], optimizer: str, timer: Timer) -> list[float]:
    """Seconds of the run's step, of the forecast's, and the second over the first."""
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    batch = x, torch.arange(len(x)) % 10
    trained = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-4)
    forecast = LinearForecast(model, trained, cross_entropy)

    def step() -> None:
        trained.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        trained.step()

    def follow() -> None:
        forecast.rates()
        forecast.step(batch)
        forecast.lost(trained)

    times = [(timer.once(step)[0], timer.once(follow)[0]) for _ in range(timer.rounds + 1)][1:]
    run, lazy = (statistics.median(column) for column in zip(*times, strict=True))
    return [run, lazy, statistics.median(b / a for a, b in times)]


def table(models: Models, optimizer: str, timer: Timer) -> str:
    rows = [f"{'model':<16}{'training step':>15}{'forecast step':>15}{'ratio':>8}"]
    for name, (make, inputs) in models.items():
        run, lazy, times = ratio(make, inputs, optimizer, timer)
        rows.append(f"{name:<16}{run * 1e3:>12.2f} ms{lazy * 1e3:>12.2f} ms{times:>8.2f}")
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--optimizer", default="Adam")
    parser.add_argument("--quick", action="store_true", help="two small models")
    args: Any = parser.parse_args(arguments)
    torch.set_num_threads(1)
    timer = Timer(args.rounds, patience=60, device=torch.device("cpu"), clock="cpu")
    said = table(QUICK if args.quick else MODELS, args.optimizer, timer)
    print(said)
    return said


if __name__ == "__main__":
    main()

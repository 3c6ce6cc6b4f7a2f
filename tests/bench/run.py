"""Speed, memory, agreement and growth of exact kernels, beside other libraries, as a Markdown page.

    python -m tests.bench.run [--output FILE] [--models MLP CNN] [--rounds 5] [--threads 2] [--device cpu] [--quick]
                              [--no-peers] [--no-growth] [--jax PYTHON] [--patience 10] [--clock wall]

`make bench` runs it in an environment where the peers are installed; elsewhere they are shown as not installed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import torch

from ntkwatch.guard import leave_no_trace
from tests.bench import jax_peer
from tests.bench.comparison import NEURAL_TANGENTS, Cell, Model, build, compare
from tests.bench.engines import float64_kernel
from tests.bench.growth import Growth, grow, large_trace_bytes, sweeps
from tests.bench.models import MODELS, QUICK
from tests.bench.table import page, write
from tests.bench.timing import CLOCKS, Timer


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    models = {k: m for k, m in (QUICK if args.quick else MODELS).items() if any(k.startswith(s) for s in args.models)}
    timer = Timer(1 if args.quick else args.rounds, args.patience, torch.device(args.device), args.clock)
    cells: list[Cell] = []
    for name, model in models.items():
        found = compare(name, model, timer, args.peers)
        if args.jax:
            _beside_jax(args.jax, model, found, timer)
        cells += found
        _progress(f"{name}: done")
    growths = _growths(timer, args.quick) if args.growth else []
    large = large_trace_bytes(timer.device) if args.growth and not args.quick else {}
    command = shlex.join(["python", "-m", "tests.bench.run", *(sys.argv[1:] if argv is None else argv)])
    write(page(cells, growths, large, command, timer, load), args.output)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", metavar="FILE", help="write the page there as well")
    parser.add_argument("--models", nargs="*", default=[""], help="beginnings of the names of models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="as torch has it, when not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds for the rounds of one slow peer")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: undisturbed by others, with one thread")
    parser.add_argument("--quick", action="store_true", help="small models, one round")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-growth", dest="growth", action="store_false")
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter with neural-tangents, timed after each model")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")
    if args.clock == "cpu" and (args.threads or torch.get_num_threads()) != 1:
        parser.error("--clock cpu adds up the time of all threads: give --threads 1 with it")
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    return args


def _beside_jax(python: str, model: Model, cells: list[Cell], timer: Timer) -> None:
    module, x = build(model, torch.device("cpu"))
    with leave_no_trace(module):
        for cell in cells:
            exact = float64_kernel(module, x, cell.quantity)
            cell.outcomes[NEURAL_TANGENTS] = jax_peer.ask(python, module, x, cell.quantity, exact, timer)


def _growths(timer: Timer, quick: bool) -> list[Growth]:
    found = []
    for sweep in sweeps(quick):
        found.append(grow(sweep, timer))
        _progress(f"growth of {sweep.quantity} over {sweep.symbol}: done")
    return found


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

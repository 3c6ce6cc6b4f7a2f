"""The constants of ntkwatch/engines/machines.py, contraction_costs.py and chunked_matmul.py, measured on this machine.

    python tests/bench/constants.py [--threads 1] [--device cpu]

They are committed, not measured at run time, so that the choice of a contraction, and with it the last bits of a
kernel, never depends on the load of a machine. Only ratios decide.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ntkwatch.engines.chunked_matmul import add_product

SIZE, CHUNK = 2048, 8192


def seconds(work: Callable[[], object], sync: Callable[[], None], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 1):
        sync()
        start = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None

    def rate(flops: float, work: Callable[[], object]) -> float:
        return flops / seconds(work, sync)

    x = torch.randn(1 << 25, device=args.device)
    y = torch.empty_like(x)
    print(f"BANDWIDTH  {2 * 4 * len(x) / seconds(lambda: y.copy_(x), sync):.2g} bytes/s (a copy, read and written)")
    layers = [m for _ in range(20) for m in (torch.nn.Linear(8, 8), torch.nn.Tanh())]
    net, tiny = torch.nn.Sequential(*layers).to(args.device), torch.zeros(1, 8, device=args.device)

    def passes() -> None:  # a forward and eight backward passes
        for output in net(tiny).unbind(1):
            torch.autograd.grad(output, [net[0].weight], retain_graph=True)

    print(f"CALL       {seconds(passes, sync) / (9 * len(layers)):.1g} s of an operation on little")
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(SIZE, SIZE, device=args.device, dtype=dtype)
        full = rate(2.0 * SIZE**3, lambda a=a: a @ a)
        print(f"FLOPS      {full:.2g} products of {SIZE} x {SIZE}, {dtype}")
        g = torch.randn(16, 16, 64, 128, device=args.device, dtype=dtype)
        inputs = torch.randn(16, 64, 512, device=args.device, dtype=dtype)
        slab = torch.empty(16, 128, 512, device=args.device, dtype=dtype)

        def slabs(g: torch.Tensor = g, inputs: torch.Tensor = inputs, slab: torch.Tensor = slab) -> None:
            for each in g:  # a slab is read again, and pushes the next gradients out of the cache
                torch.bmm(each.transpose(1, 2), inputs, out=slab)
                slab.sum()

        reading = seconds(lambda s=slab: s.sum(), sync) * len(g)
        share = 2.0 * g.numel() * 512 / (seconds(slabs, sync) - reading) / full
        print(f"MANY       {share:.2f} of it, for batches of 128 x 64 x 512, from and to memory")
        for side in (8, 16, 32):
            small = torch.randn(4096, side, side, device=args.device, dtype=dtype)
            made = torch.empty_like(small)
            each = seconds(lambda small=small, made=made: torch.bmm(small, small, out=made), sync) / len(small)
            print(f"PAD        {(each * full / 2) ** (1 / 3) - side:.1f} for each side of products of {side} x {side}")
        for n in (8, 16, 32, 64, 128, 256):
            j, out = torch.randn(n, CHUNK, device=args.device, dtype=dtype), a.new_zeros(n, n)
            whole = rate(2.0 * n * n * CHUNK, lambda j=j, out=out: out.addmm_(j, j.T)) / full

            def row_blocks(j: torch.Tensor = j, out: torch.Tensor = out) -> None:
                add_product(out, j, j, same=True)

            print(
                f"skinny     {n:4d} rows: {whole:.2f}; in row blocks {rate(2.0 * n * n * CHUNK, row_blocks) / full:.2f}"
            )


if __name__ == "__main__":
    main()

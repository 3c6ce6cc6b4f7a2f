"""ntkwatch.infinite beside neural-tangents 0.6.5: agreement on random architectures, and speed.

    python -m tests.bench.neural_tangents [--speed] [--freeze] [--python PATH]      # make bench-jax
    python -m tests.bench.neural_tangents --growth                                  # of our cost alone, without JAX

builds an environment with JAX 0.4.25 (newer JAX cannot run neural-tangents) in a temporary folder unless --python names
one, prints the table, and with --freeze writes the values to tests/infinite_neural_tangents.json, which the ordinary
tests read. The file runs itself in the other environment, so it imports neither torch nor jax at the top.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

FROZEN = Path(__file__).parents[1] / "support" / "infinite_neural_tangents.json"
PINS = ["neural-tangents==0.6.5", "jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13"]
INPUTS = {"dense": (4, 5), "image": (4, 5, 6, 3), "series": (4, 7, 3), "tokens": (4, 5, 4)}  # channels last


def random_cases(seed: int = 0) -> list[dict[str, Any]]:
    """28 architectures as nested lists: every family, with random widths of windows, variances and activations."""
    r = random.Random(seed)
    families = [dense, dense_residual, conv_flatten, conv_pool, conv_residual, series, attention]
    return [
        {"name": f"{f.__name__}-{i}", "input": s, "layers": x} for i in range(4) for f in families for s, x in [f(r)]
    ]


def dense(r: random.Random) -> tuple[str, list]:
    return "dense", [x for _ in range(r.randint(1, 5)) for x in (linear(r), nonlinear(r))] + [linear(r)]


def dense_residual(r: random.Random) -> tuple[str, list]:
    block = [["layernorm"], linear(r), nonlinear(r), linear(r)]
    return "dense", [linear(r), ["residual", block], ["residual", [linear(r), nonlinear(r), linear(r)]], linear(r)]


def conv_flatten(r: random.Random) -> tuple[str, list]:
    return "image", [x for _ in range(r.randint(1, 3)) for x in (conv(r, 2), nonlinear(r))] + [["flatten"], linear(r)]


def conv_pool(r: random.Random) -> tuple[str, list]:
    start = [conv(r, 2, 1), nonlinear(r), ["avgpool", 2, r.choice([1, 2]), r.choice(["valid", "same"])], conv(r, 2, 1)]
    return "image", [*start, nonlinear(r), r.choice([["globalavgpool"], ["flatten"]]), linear(r)]


def conv_residual(r: random.Random) -> tuple[str, list]:
    block = [nonlinear(r), conv(r, 2, 1, ("same", "circular")), ["layernorm"], nonlinear(r), conv(r, 2, 1, ("same",))]
    return "image", [conv(r, 2), ["residual", block], nonlinear(r), ["globalavgpool"], linear(r)]


def series(r: random.Random) -> tuple[str, list]:
    layers = [x for _ in range(r.randint(1, 3)) for x in (conv(r, 1), nonlinear(r))]
    return "series", [*layers, r.choice([["globalavgpool"], ["flatten"]]), linear(r)]


def attention(r: random.Random) -> tuple[str, list]:
    heads = [
        ["attention", r.choice(["softmax", "linear"]), *[round(r.uniform(0.5, 1.3), 2) for _ in range(5)]] for _ in "ab"
    ]
    block = [["layernorm"], heads[1]]
    mlp = ["residual", [["layernorm"], linear(r), nonlinear(r), linear(r)]]
    return "tokens", [linear(r), heads[0], ["residual", block], mlp, ["globalavgpool"], linear(r)]


def linear(r: random.Random) -> list:
    return ["dense", round(r.uniform(0.5, 1.8), 2), round(r.uniform(0, 0.7), 2)]


def conv(
    r: random.Random, spatial: int, stride: int = 0, padding: tuple[str, ...] = ("same", "valid", "circular")
) -> list:
    size = [r.choice([1, 2, 3]) for _ in range(spatial)]
    steps = [stride or r.choice([1, 2]) for _ in range(spatial)]
    return ["conv", size, steps, r.choice(padding), round(r.uniform(0.5, 1.8), 2), round(r.uniform(0, 0.7), 2)]


def nonlinear(r: random.Random) -> list:
    return r.choice([["relu"], ["erf"], ["gelu"], ["sin"], ["abs"], ["leakyrelu", 0.3]])


def inputs(kind: str) -> Any:
    """Fixed irregular numbers, [n, *positions, C]."""
    import numpy as np

    shape = INPUTS[kind]
    return np.sin(1.0 + 1.7 * np.arange(np.prod(shape)) ** 1.3).reshape(shape)


def ours(layers: list) -> Any:
    """The list as a spec of ntkwatch.infinite."""
    from ntkwatch import infinite as inf

    make = {
        "dense": inf.Dense,
        "conv": lambda size, stride, *rest: inf.Conv(tuple(size), tuple(stride), *rest),
        "residual": lambda block: inf.Residual(ours(block)),
        "layernorm": lambda: inf.LayerNorm(1e-12),
        "attention": inf.Attention,
        "avgpool": inf.AvgPool,
        "globalavgpool": inf.GlobalAvgPool,
        "flatten": inf.Flatten,
        "relu": inf.Relu,
        "erf": inf.Erf,
        "gelu": inf.Gelu,
        "sin": inf.Sin,
        "abs": inf.Abs,
        "leakyrelu": inf.LeakyRelu,
    }
    return inf.Serial(*[make[name](*args) for name, *args in layers])


def our_kernel(case: dict[str, Any]) -> Any:
    import torch

    from ntkwatch import infinite

    x = torch.as_tensor(inputs(case["input"]))
    if case["input"] in ("image", "series"):
        x = x.movedim(-1, 1)
    return infinite.kernel(ours(case["layers"]), x)


def theirs(layers: list) -> Any:
    """The list as a network of neural_tangents.stax."""
    from tests.bench.neural_tangents import stax as s

    def conv(size: list, stride: list, padding: str, w: float, b: float) -> Any:
        return s.Conv(1, size, stride, padding.upper(), W_std=w, b_std=b)

    def attend(variant: str, query: float, key: float, value: float, out: float, b: float) -> Any:
        softmax = variant == "softmax"
        mechanism = s.AttentionMechanism.SOFTMAX if softmax else s.AttentionMechanism.IDENTITY
        return s.GlobalSelfAttention(
            1, 1, 1, 1, linear_scaling=softmax, W_key_std=key, W_value_std=value, W_query_std=query, W_out_std=out,
            b_std=b, attention_mechanism=mechanism,
        )  # fmt: skip

    def residual(block: list) -> Any:
        return s.serial(s.FanOut(2), s.parallel(s.Identity(), theirs(block)), s.FanInSum())

    make = {
        "dense": lambda w, b: s.Dense(1, W_std=w, b_std=b),
        "conv": conv,
        "residual": residual,
        "layernorm": lambda: s.LayerNorm(eps=1e-12),
        "attention": attend,
        "avgpool": lambda w, stride, padding: s.AvgPool((w, w), (stride, stride), padding.upper()),
        "globalavgpool": s.GlobalAvgPool,
        "flatten": s.Flatten,
        "relu": s.Relu,
        "erf": s.Erf,
        "gelu": s.Gelu,
        "sin": s.Sin,
        "abs": s.Abs,
        "leakyrelu": lambda slope: s.LeakyRelu(slope),
    }
    return s.serial(*[make[name](*args) for name, *args in layers])


def their_kernels(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs in the JAX environment."""
    import jax

    jax.config.update("jax_enable_x64", True)
    out = []
    for case in cases:
        k = theirs(case["layers"])[2](inputs(case["input"]), None, ("nngp", "ntk"))
        out.append({"nngp": k.nngp.tolist(), "ntk": k.ntk.tolist()})
    return out


def speed_cases() -> dict[str, tuple[tuple[int, ...], list]]:
    block = [["conv", [3, 3], [1, 1], "same", 1.4, 0.1], ["relu"]]
    layer = [["dense", 1.4, 0.1], ["relu"]]
    return {
        "dense depth 5, n = 2000": ((2000, 64), [*layer * 5, ["dense", 1.0, 0.0]]),
        "CNTK 4 layers + pooling, 8x8, n = 200": ((200, 8, 8, 1), [*block * 4, ["globalavgpool"], ["dense", 1.0, 0.0]]),
    }


def seconds_theirs(name: str) -> tuple[float, float]:
    """Wall and CPU seconds of a compiled call."""
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    shape, layers = speed_cases()[name]
    x = np.random.RandomState(0).randn(*shape)
    function = jax.jit(theirs(layers)[2], static_argnums=(2,))
    times = []
    for _ in range(2):  # the first call compiles
        start = time.perf_counter(), time.process_time()
        k = function(x, None, ("nngp", "ntk"))
        jax.block_until_ready((k.nngp, k.ntk))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(times)


def seconds_ours(name: str) -> tuple[float, float]:
    """Wall and CPU seconds on one thread."""
    return _timed(*speed_cases()[name])


def _timed(shape: tuple[int, ...], layers: list) -> tuple[float, float]:
    import numpy as np
    import torch

    from ntkwatch import infinite

    x = torch.as_tensor(np.random.RandomState(0).randn(*shape))
    x = x.movedim(-1, 1) if x.ndim == 4 else x
    torch.set_num_threads(1)
    infinite.kernel(ours(layers), x[:8])
    start = time.perf_counter(), time.process_time()
    infinite.kernel(ours(layers), x)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def environment() -> str:
    folder = Path(tempfile.gettempdir()) / "ntkwatch-neural-tangents"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
    return str(python)


def ask(python: str, request: dict[str, Any]) -> Any:
    """This file's answer to a request in the other environment."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [python, "-I", "-Wignore", __file__, "--answer"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=env,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(python: str, freeze: bool) -> float:
    import torch

    cases = random_cases()
    worst = 0.0
    print(f"{'architecture':<20}{'layers':>7}{'NNGP':>12}{'NTK':>12}   largest difference / largest entry")
    for case, expected in zip(cases, ask(python, {"cases": cases}), strict=True):
        case.update(expected)
        k = our_kernel(case)
        gaps = []
        for mine, other in ((k.nngp, case["nngp"]), (k.ntk, case["ntk"])):
            other = torch.tensor(other, dtype=torch.float64)
            gaps.append(float(((mine - other).abs() / other.abs().max()).max()))
        worst = max(worst, *gaps)
        print(f"{case['name']:<20}{len(case['layers']):>7}{gaps[0]:>12.1e}{gaps[1]:>12.1e}")
    print(f"largest of {len(cases)}: {worst:.1e}")
    if freeze:
        FROZEN.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
    return worst


def speed(python: str, rounds: int = 3) -> None:
    """The best of interleaved rounds; CPU seconds do not depend on what else the machine is doing."""
    for name in speed_cases():
        pairs = [(seconds_ours(name), ask(python, {"speed": name})) for _ in range(rounds)]
        for i, kind in enumerate(("wall", "CPU")):
            mine, other = (min(p[j][i] for p in pairs) for j in (0, 1))
            print(f"{name}: {kind} s, one thread of ours {mine:.2f}, neural-tangents {other:.2f}: {other / mine:.1f}x")


def growth() -> None:
    """Exponents of our CPU seconds, which the layout of the computation predicts."""
    block = [["conv", [3, 3], [1, 1], "same", 1.4, 0.1], ["relu"]] * 4
    layer = [["dense", 1.4, 0.1], ["relu"]]
    pool, flat = [*block, ["globalavgpool"], ["dense", 1.0, 0.0]], [*block, ["flatten"], ["dense", 1.0, 0.0]]
    cases: list[tuple[str, int, list[tuple[int, tuple[int, ...], list]]]] = [
        ("dense, rows", 2, [(n, (n, 64), [*layer * 5, ["dense", 1.0, 0.0]]) for n in (1000, 2000, 4000)]),
        ("dense, depth", 1, [(d, (1500, 64), [*layer * d, ["dense", 1.0, 0.0]]) for d in (10, 20, 40)]),
        ("pooling, positions", 2, [(s * s, (24, s, s, 1), pool) for s in (6, 8, 12)]),
        ("pooling, rows", 2, [(n, (n, 8, 8, 1), pool) for n in (32, 64, 128)]),
        ("flatten, positions", 1, [(s * s, (96, s, s, 1), flat) for s in (16, 24, 32)]),
    ]
    for name, expected, points in cases:
        seconds = [min(_timed(shape, layers)[1] for _ in range(2)) for _, shape, layers in points]
        slope = math.log(seconds[-1] / seconds[0]) / math.log(points[-1][0] / points[0][0])
        print(f"growth with {name}: exponent {slope:.2f} (expected {expected})")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag in ("--speed", "--growth", "--freeze", "--answer"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--python", help="the interpreter of an environment with neural-tangents")
    args = parser.parse_args()
    if args.answer:
        request = json.load(sys.stdin)
        print(json.dumps(their_kernels(request["cases"]) if "cases" in request else seconds_theirs(request["speed"])))
        return 0
    if args.growth:
        growth()
        return 0
    python = args.python or environment()
    worst = compare(python, args.freeze)
    if args.speed:
        speed(python)
        growth()
    return 0 if worst <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())

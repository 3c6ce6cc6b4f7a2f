"""neural-tangents' structured derivatives on the same weights and inputs, in an interpreter that has JAX.

The file runs itself there, so it imports neither torch nor jax at the top. Only chains of layers are translated.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tests.bench.timing import Outcome, Timer


def layers_of(module: nn.Module) -> list[list[Any]]:
    """A chain as [name, *settings] per layer.

    Raises:
        NotImplementedError: a layer that is not translated.
    """
    from torch import nn

    found: list[list[Any]] = []
    for layer in module if isinstance(module, nn.Sequential) else [module]:
        if isinstance(layer, nn.Conv2d):
            found.append(["conv", list(layer.stride), [[p, p] for p in layer.padding]])
        elif isinstance(layer, nn.Linear | nn.ReLU) or (isinstance(layer, nn.Flatten) and found[-1:] == [["pool"]]):
            found.append([type(layer).__name__.lower()])
        elif isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size == 1:
            found.append(["pool"])
        else:
            raise NotImplementedError(f"{type(layer).__name__} is not translated to JAX")
    return found


def ask(python: str, module: nn.Module, x: Tensor, quantity: str, exact: Tensor, timer: Timer) -> Outcome:
    """Median seconds of the compiled function, and its error, from a process of its own."""
    import torch

    from tests.bench.timing import Outcome, relative_error

    try:
        request = {"layers": layers_of(module), "quantity": quantity, "rounds": timer.rounds, "clock": timer.clock}
    except NotImplementedError as error:
        return Outcome(note=f"refused: {error}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        arrays = {f"p{i}": _channels_last(p.detach().cpu().numpy()) for i, p in enumerate(module.parameters())}
        np.savez(path, x=np.moveaxis(x.cpu().numpy(), 1, -1), **arrays)
        done = subprocess.run(
            [python, "-I", "-Wignore", __file__, str(path)],
            input=json.dumps(request), capture_output=True, text=True, env=_environment(torch.get_num_threads()),
        )  # fmt: skip
        if done.returncode:
            return Outcome(note=f"refused: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}")
        kernel = torch.from_numpy(np.load(path.with_suffix(".out.npy")))
    return Outcome(
        json.loads(done.stdout.splitlines()[-1])["seconds"], timer.rounds, relative_error(kernel, exact.cpu())
    )


def _channels_last(p: np.ndarray) -> np.ndarray:
    """A weight in JAX's own layout: its rules know no transposed use of a parameter, and fall back to slow ones."""
    return np.ascontiguousarray(p.T if p.ndim < 4 else p.transpose(2, 3, 1, 0))


def _environment(threads: int) -> dict[str, str]:
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if threads == 1 else ""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": one}


def apply(layers: list[list[Any]], parameters: list[Any], x: Any) -> Any:
    """The chain in JAX, channels last."""
    import jax
    import jax.numpy as jnp

    left = list(parameters)
    for name, *settings in layers:
        if name == "linear":
            w, b = left.pop(0), left.pop(0)
            x = x @ w + b
        elif name == "conv":
            w, b = left.pop(0), left.pop(0)
            axes = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, w, *settings, dimension_numbers=axes) + b
        elif name == "relu":
            x = jnp.maximum(x, 0)
        elif name == "pool":
            x = x.mean((1, 2), keepdims=True)
        else:
            x = x.reshape(len(x), -1)
    return x


def answer(path: Path, request: dict[str, Any]) -> float:
    """Runs in the JAX environment: median seconds; the kernel goes to a file beside the arrays."""
    import jax
    import neural_tangents as nt

    arrays = np.load(path)
    x = jax.numpy.asarray(arrays["x"])
    parameters = [jax.numpy.asarray(arrays[f"p{i}"]) for i in range(len(arrays.files) - 1)]
    kernel = nt.empirical_ntk_fn(
        lambda p, x: apply(request["layers"], p, x),
        trace_axes=(-1,) if request["quantity"] == "trace" else (),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    function = jax.jit(lambda x, p: kernel(x, None, p))
    theta = np.asarray(function(x, parameters))  # compiles
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[request["clock"]]
    times = []
    for _ in range(request["rounds"]):
        start = clock()
        function(x, parameters).block_until_ready()
        times.append(clock() - start)
    np.save(path.with_suffix(".out.npy"), theta if theta.ndim == 2 else theta.transpose(0, 2, 1, 3))
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps({"seconds": answer(Path(sys.argv[1]), json.load(sys.stdin))}))

"""The oracle: torch.func's vmap(jacrev(functional_call)), contracted parameter by parameter, in blocks of probes."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkwatch.engines.base import Kernel, Precision, Reduction, noise_floor, reduce, richest, work_dtype
from ntkwatch.model import (
    Network,
    UnsupportedModel,
    batch_size,
    eager,
    inputs_of,
    is_per_example,
    leaves,
    map_leaves,
    take,
)

_BLOCK_BYTES = 1 << 30  # Jacobians of one pair of blocks, when chunk_size is not given


class Functional:
    """Exact on whatever torch.func can transform; its memory is that of the Jacobians of a block."""

    name = "functional"

    def kernel(
        self,
        network: Network,
        x1: Any,
        x2: Any = None,
        *,
        reduction: Reduction = "trace",
        layers: Reduction | None = "trace",
        state: Mapping[str, Tensor] | None = None,
        chunk_size: int | None = None,
        precision: Precision = "double",
    ) -> Kernel:
        """See `Engine.kernel`. Raises UnsupportedModel where torch.func cannot transform the model."""
        parameters = trained_at(network, state)
        dtype = work_dtype(next(iter(parameters.values())).dtype, precision)
        with torch.no_grad():
            outputs = network.outputs(x1, state).detach()
        chunk = chunk_size or self.chunk(parameters, outputs.shape[1])
        rich = richest(reduction, layers)
        blocks1 = _blocks(x1, chunk)
        rows: list[dict[str, Tensor]] = []
        for i, block1 in enumerate(blocks1):
            j1 = self._jacobian(network, block1, parameters, state)
            row: list[dict[str, Tensor]] = []
            for k, block2 in enumerate(blocks1[: i + 1] if x2 is None else _blocks(x2, chunk)):
                j2 = j1 if x2 is None and k == i else self._jacobian(network, block2, parameters, state)
                row.append({name: contract(j1[name], j2[name], rich, dtype) for name in parameters})
            rows.append({name: torch.cat([cell[name] for cell in row], _COLUMNS[rich]) for name in parameters})
        theta = {name: _assemble([row[name] for row in rows], rich, x2 is None) for name in parameters}
        total = torch.stack(list(theta.values())).sum(0)
        kept = {} if layers is None else {name: reduce(t, rich, layers) for name, t in theta.items()}
        floor = noise_floor(outputs.dtype, precision, max(p.numel() for p in parameters.values()))
        return Kernel(reduce(total, rich, reduction), kept, outputs, reduction, self.name, precision, floor)

    def chunk(self, parameters: Mapping[str, Tensor], n_outputs: int) -> int:
        """Probes per block such that two blocks of Jacobians and the cast of one parameter's fit in the limit."""
        per_probe = n_outputs * 2 * sum(p.numel() * p.element_size() for p in parameters.values())
        largest = n_outputs * 16 * max(p.numel() for p in parameters.values())
        return max(1, _BLOCK_BYTES // (per_probe + largest))

    def _jacobian(
        self, network: Network, block: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Per-example Jacobians, {name: [n, C, *shape]}."""
        n = batch_size(inputs_of(block))
        rows = [leaf for leaf in leaves(block) if is_per_example(leaf, n)]
        rest = {name: value for name, value in (state or {}).items() if name not in parameters}

        def f(theta: dict[str, Tensor], *row: Tensor) -> Tensor:
            given = iter(row)
            one = map_leaves(lambda leaf: next(given)[None] if is_per_example(leaf, n) else leaf, block)
            return network.outputs(one, {**rest, **theta})[0]

        try:
            with math_attention(), eager():
                return vmap(jacrev(f), (None, *(0 for _ in rows)))(dict(parameters), *rows)
        except UnsupportedModel:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            first = re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__
            raise UnsupportedModel(
                f"torch.func cannot transform this model ({first}); use engine='layerwise' or 'auto'"
            ) from error


_COLUMNS: dict[str, int] = {"trace": 1, "sum": 1, "blocks": 2, "full": 2}
_ROWS: dict[str, int] = {"trace": 0, "sum": 0, "blocks": 1, "full": 0}


def trained_at(network: Network, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The trained parameters, at `state` where it names them."""
    return {name: (state or {}).get(name, p).detach() for name, p in network.parameters.items()}


def contract(j1: Tensor, j2: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """The kernel of two blocks of one parameter's Jacobians [n, C, ...], products in `dtype`."""
    a, b = (j.detach().reshape(*j.shape[:2], -1).to(dtype) for j in (j1, j2))
    n_outputs = a.shape[1]
    if reduction == "full":
        return torch.einsum("ncp,mdp->ncmd", a, b)
    if reduction == "blocks":
        return torch.einsum("ncp,mcp->cnm", a, b)
    if reduction == "sum":
        a, b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
    return a.flatten(1) @ b.flatten(1).T / n_outputs


def _blocks(x: Any, chunk: int) -> list[Any]:
    n = batch_size(inputs_of(x))
    return [x] if chunk >= n else [take(x, slice(i, i + chunk)) for i in range(0, n, chunk)]


def _assemble(rows: list[Tensor], reduction: str, symmetric: bool) -> Tensor:
    """Rows of blocks → kernel; of a symmetric one only the lower half was computed."""
    if not symmetric:
        return torch.cat(rows, _ROWS[reduction])
    n = rows[-1].shape[_COLUMNS[reduction]]
    shape = list(rows[-1].shape)
    shape[_ROWS[reduction]] = n
    whole, start = rows[-1].new_zeros(shape), 0
    for row in rows:
        size = row.shape[_ROWS[reduction]]
        part = whole.narrow(_ROWS[reduction], start, size)
        part.narrow(_COLUMNS[reduction], 0, row.shape[_COLUMNS[reduction]]).copy_(row)
        whole.narrow(_COLUMNS[reduction], start, size).narrow(
            _ROWS[reduction], 0, row.shape[_COLUMNS[reduction]]
        ).copy_(transpose(row, reduction))
        start += size
    return whole


def transpose(kernel: Tensor, reduction: str) -> Tensor:
    """The kernel with the two sides exchanged."""
    return kernel.permute(2, 3, 0, 1) if reduction == "full" else kernel.transpose(-1, -2)


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Attention by its formula: the fused kernels have no batching rule and fall back to a slow loop.

    Operations that do fall back are right, only slower: torch's warning about it would be noise in a person's run.
    """
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(performance drop|experimental feature).*")
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is out-of-memory; on the CPU that is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )

"""Other ways to the same kernel at float32: `trace(module, x)` [n, n] and `full(module, x)` [n, C, n, C] of each peer.

Each is used in the way of its own that was fastest where it fits in memory; a peer that cannot do a model raises.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Rows = list[Tensor]  # per parameter, [n, …]: the Jacobian of one output, or of all with [n, C, …]
WHOLE_JACOBIAN = 4 << 30  # bytes up to which all outputs' gradients are held together for a trace as well


@dataclass(frozen=True)
class Peer:
    """A library (`distribution` in the package index; None for torch alone) and its two kernels."""

    name: str
    distribution: str | None
    trace: Callable[[nn.Module, Tensor], Tensor]
    full: Callable[[nn.Module, Tensor], Tensor]

    def version(self) -> str | None:
        """The installed version, None where there is none."""
        try:
            return torch.__version__ if self.distribution is None else importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def trace_of(jacobians: Iterator[Rows] | list[Rows], outputs: int) -> Tensor:
    """K = (1/C) Σ_c G_c G_cᵀ from the Jacobians of one output after another."""
    return sum(g.flatten(1) @ g.flatten(1).T for rows in jacobians for g in rows) / outputs  # type: ignore[return-value]


def full_of(rows: Rows) -> Tensor:
    """Θ = J Jᵀ from the Jacobian of all outputs, [n, C, …] per parameter."""
    n, c = rows[0].shape[:2]
    return sum((f := j.reshape(n * c, -1)) @ f.T for j in rows).reshape(n, c, n, c)  # type: ignore[union-attr]


def outputs_of(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        return module(x[:1]).shape[1]


def jacobian_bytes(module: nn.Module, x: Tensor) -> int:
    return 4 * len(x) * outputs_of(module, x) * sum(p.numel() for p in module.parameters())


def tutorial(module: nn.Module, x: Tensor, equation: str) -> Tensor:
    """The idea of PyTorch's tutorial: vmap(jacrev) of the functional model, contracted per parameter by einsum."""
    parameters = {k: p.detach() for k, p in module.named_parameters()}

    def f(p: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (one[None],))[0]

    j = torch.func.vmap(torch.func.jacrev(f), (None, 0))(parameters, x)
    return sum(torch.einsum(equation, t.flatten(2), t.flatten(2)) for t in j.values())  # type: ignore[return-value]


def tutorial_trace(module: nn.Module, x: Tensor) -> Tensor:
    return tutorial(module, x, "ncp,mcp->nm") / outputs_of(module, x)


def tutorial_full(module: nn.Module, x: Tensor) -> Tensor:
    return tutorial(module, x, "ncp,mdp->ncmd")


def all_linear(module: nn.Module) -> bool:
    """nngeometry contracts without a Jacobian at linear layers alone; at others its Gram makes it for every pair of
    outputs, so that making it once is faster."""
    return all(isinstance(m, nn.Linear) for m in module.modules() if list(m.parameters(recurse=False)))


def nngeometry_gram(function: Callable[..., Tensor], module: nn.Module, x: Tensor) -> Tensor:
    from nngeometry.gram import GramMatrix
    from nngeometry.object import FMatDense

    examples = (x.clone(), torch.zeros(len(x), device=x.device))
    return GramMatrix(module, examples, function=function, representation=FMatDense).to_torch()


def nngeometry_jacobian(module: nn.Module, x: Tensor, output: slice) -> Tensor:
    from nngeometry.jacobian import Jacobian

    examples = (x.clone(), torch.zeros(len(x), device=x.device))
    return Jacobian(module, examples, function=lambda *d: module(d[0])[:, output]).to_torch()  # [C, n, P]


def nngeometry_trace(module: nn.Module, x: Tensor) -> Tensor:
    """The sum over outputs of each output's Gram, which costs 2C passes where the full one costs C² + C."""
    c = outputs_of(module, x)
    ones = [slice(i, i + 1) for i in range(c)]
    if all_linear(module):
        grams = (nngeometry_gram(lambda *d, i=i: module(d[0])[:, i], module, x)[0, :, 0] for i in ones)
        return sum(grams) / c  # type: ignore[return-value]
    slices = [slice(None)] if jacobian_bytes(module, x) < WHOLE_JACOBIAN else ones
    return trace_of(([g] for s in slices for g in nngeometry_jacobian(module, x, s)), c)


def nngeometry_full(module: nn.Module, x: Tensor) -> Tensor:
    if all_linear(module):
        return nngeometry_gram(lambda *d: module(d[0]), module, x).permute(1, 0, 3, 2)
    j = nngeometry_jacobian(module, x, slice(None))
    c, n, _ = j.shape
    return (j.flatten(0, 1) @ j.flatten(0, 1).T).reshape(c, n, c, n).permute(1, 0, 3, 2)


def traker_rows(module: nn.Module, x: Tensor, output: int) -> Rows:
    """traker's per-example gradients of one output, which it would go on to project."""
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput
    from trak.utils import get_num_params

    class One(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        def get_output(self, model: nn.Module, weights: dict, buffers: dict, one: Tensor) -> Tensor:
            return torch.func.functional_call(model, (weights, buffers), (one[None],))[0, output]

        def get_out_to_loss_grad(self, *_: object) -> Tensor:
            raise NotImplementedError("a kernel has no loss")

    computer = FunctionalGradientComputer(module, One(), get_num_params(module), torch.float32, x.device)
    return [g.detach() for g in computer.compute_per_sample_grad((x,)).values()]


def traker_trace(module: nn.Module, x: Tensor) -> Tensor:
    c = outputs_of(module, x)
    return trace_of((traker_rows(module, x, i) for i in range(c)), c)


def traker_full(module: nn.Module, x: Tensor) -> Tensor:
    parts = zip(*(traker_rows(module, x, i) for i in range(outputs_of(module, x))), strict=True)
    return full_of([torch.stack(p, 1) for p in parts])


def curvlinops_rows(module: nn.Module, x: Tensor, columns: Tensor) -> Rows:
    """Jᵀ of one example after another on columns [C, k] of the identity: [n, k, …] per parameter.

    One operator over the batch would carry every example through the passes of each other.
    """
    from curvlinops import TransposedJacobianLinearOperator

    parameters = list(module.parameters())
    found = []
    for i in range(len(x)):
        data = [(x[i : i + 1], torch.zeros(1, device=x.device))]
        adjoint = TransposedJacobianLinearOperator(module, parameters, data, check_deterministic=False, num_data=1)
        found.append([t.detach().movedim(-1, 0) for t in adjoint @ [columns[None]]])
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def curvlinops_trace(module: nn.Module, x: Tensor) -> Tensor:
    c = outputs_of(module, x)
    eye = torch.eye(c, device=x.device)
    if jacobian_bytes(module, x) < WHOLE_JACOBIAN:
        rows = curvlinops_rows(module, x, eye)
        return trace_of([[j[:, i] for j in rows] for i in range(c)], c)
    return trace_of((curvlinops_rows(module, x, eye[:, i : i + 1]) for i in range(c)), c)


def curvlinops_full(module: nn.Module, x: Tensor) -> Tensor:
    return full_of(curvlinops_rows(module, x, torch.eye(outputs_of(module, x), device=x.device)))


PEERS = (
    Peer("tutorial", None, tutorial_trace, tutorial_full),
    Peer("nngeometry", "nngeometry", nngeometry_trace, nngeometry_full),
    Peer("traker", "traker", traker_trace, traker_full),
    Peer("curvlinops", "curvlinops-for-pytorch", curvlinops_trace, curvlinops_full),
)

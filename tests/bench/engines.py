"""The layerwise engine as the benchmark runs it: kernels, the floor, the float64 reference, memory."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ntkwatch.engines import empirical_ntk
from ntkwatch.engines.auto import Choice
from ntkwatch.engines.base import Plan, Precision, Reduction
from ntkwatch.engines.graph import edges, rearranges, walk
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.planning import Wanted, make_plan
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network


class Ours:
    """One model and batch, held as a Monitor holds them: what was learned of the model at the first call is kept."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        self._network, self._engine = Network(module), Layerwise()

    def kernel(self, reduction: Reduction, precision: Precision) -> Tensor:
        """The caller holds the guard."""
        kernel = self._engine.kernel(self._network, self.x, reduction=reduction, layers=None, precision=precision)
        return kernel.value

    def whole_call(self, reduction: Reduction) -> Tensor:
        """`empirical_ntk` as a person calls it: guard, choice of the engine, its self-check, and the kernel."""
        return empirical_ntk(self.module, self.x, reduction=reduction, precision="single")

    def plan(self, reduction: Reduction, precision: Precision) -> Plan:
        """What `ntkwatch.plan` says of the layerwise engine, without the self-check that chooses it."""
        return make_plan(
            Choice(self._engine, "benchmark", None), self._network, self.x, Wanted(reduction, None, precision, None)
        )


def float64_kernel(module: nn.Module, x: Tensor, reduction: Reduction) -> Tensor:
    """The kernel of a float64 copy of the model."""
    exact = copy.deepcopy(module).double()
    with leave_no_trace(exact):
        return Ours(exact, x.double() if x.is_floating_point() else x).kernel(reduction, "double")


def floor(module: nn.Module, x: Tensor) -> None:
    """One forward and C backward passes to every layer's output, of which nothing is contracted."""
    f = module(x)
    graph = walk(f, dict(module.named_parameters()))
    above = {n: None for leaf in graph.leaves.values() for n, _ in graph.consumers[leaf]}
    above = {n: None for m in above for n in ([c for c, _ in graph.consumers[m]] if rearranges(m) else [m])}
    wanted = edges(graph, list(above))
    for c in range(f.shape[1]):
        torch.autograd.grad([f[:, c].sum()], wanted, retain_graph=True)

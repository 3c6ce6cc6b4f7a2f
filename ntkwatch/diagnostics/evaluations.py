"""What a model can still be asked at a probe: features, gradients of its layers' inputs, rescaled kernels, one step.

Each costs a pass or more and is done only when a diagnostic asks, inside the probe's guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ntkwatch.engines.base import Engine, Kernel, Reduction, UnsupportedModel
from ntkwatch.engines.functional import Functional
from ntkwatch.engines.rounding import rounding_error
from ntkwatch.metrics.undefined import Undefined
from ntkwatch.model import Network, batch_size, inputs_of
from ntkwatch.model.loss import LossAt

NO_THETA_0 = "θ_0 is not kept above 2 GB of parameters"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
T = TypeVar("T")


class ScaledNetwork(Network):
    """The same network in coordinates φ with θ = θ_now + s·(φ − θ_now): its kernel at θ_now is J s² Jᵀ."""

    def __init__(self, network: Network, scales: Mapping[str, Tensor | float]) -> None:
        # Not Network.__init__: which parameters are trained is settled, whatever requires_grad says by now.
        self.__dict__.update(network.__dict__)
        self._scales = {name: scales[name] for name in network.parameters}

    def outputs(self, batch: Any, state: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs at φ, which `state` gives by parameter name."""
        swapped = dict(state or {})
        for name, scale in self._scales.items():
            phi, now = swapped.get(name, self.parameters[name]), self.parameters[name].detach()
            s = scale.to(now) if isinstance(scale, Tensor) else scale
            swapped[name] = now + s * (phi - now)
        return super().outputs(batch, swapped)


class Instruments:
    """A network on one probe batch, with `state` (BatchNorm statistics) in place and θ_0 for comparison.

    kept: what was computed at θ_0 on this batch, for later probes of it. first: θ_0 is where the network is now.
    """

    def __init__(
        self,
        network: Network,
        batch: Any,
        engine: Engine,
        state: Mapping[str, Tensor],
        start: Callable[[], Mapping[str, Tensor] | None],
        kept: dict[str, Tensor] | None = None,
        first: bool = False,
    ) -> None:
        self.network, self.batch, self.engine, self.state = network, batch, engine, dict(state)
        self._start, self._kept, self._first = start, {} if kept is None else kept, first
        self._done: dict[str, Any] = {}

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, done at the first call of that name in this probe."""
        if name not in self._done:
            self._done[name] = compute()
        return cast(T, self._done[name])

    def at_start(self, name: str, now: Tensor, compute: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """`compute` of θ_0 and s_0, once for all probes of this batch. now: what it is of the network as it stands."""
        if name not in self._kept:
            self._kept[name] = now if self._first else compute(self.start)
        return self._kept[name]

    @cached_property
    def start(self) -> Mapping[str, Tensor]:
        """θ_0 and s_0 by name, on the network's device; raises `Undefined` where θ_0 was not kept."""
        found = self._start()
        if found is None:
            raise Undefined(NO_THETA_0)
        return found

    def kernel(self, scales: Mapping[str, Tensor | float], reduction: Reduction) -> Kernel:
        """J S Jᵀ with the diagonal S given by parameter name, a number or a tensor of the parameter's shape."""
        roots = {name: s.sqrt() if isinstance(s, Tensor) else s**0.5 for name, s in scales.items()}
        scaled = ScaledNetwork(self.network, roots)
        try:
            return Functional().kernel(scaled, self.batch, reduction=reduction, layers=None, state=self.state)
        except UnsupportedModel:  # torch.func cannot: the graph engine sees the scaling as one more operation
            return self.engine.kernel(scaled, self.batch, reduction=reduction, layers=None, state=self.state)

    def plain_kernel(self, state: Mapping[str, Tensor], reduction: Reduction, signed: bool = False) -> Tensor:
        """The kernel of the probes at a state, float64 on the CPU; `signed` as in `Engine.kernel`."""
        found = self.engine.kernel(
            self.network, self.batch, reduction=reduction, layers=None, state=state, signed=signed
        )
        return found.value.detach().double().cpu()

    def sign_kernel(self, state: Mapping[str, Tensor]) -> Tensor:
        """J sign(J)ᵀ at a state, trace-reduced [n, n]."""
        return self.plain_kernel(state, "trace", signed=True)

    # ── features ──────────────────────────────────────────────────────────────────────────────────────────────────
    @cached_property
    def features(self) -> Tensor:
        """[n, d]: the input of the last executed trained Linear or convolution, float64 on the CPU."""
        return self._features(self.state)

    @cached_property
    def features_0(self) -> Tensor:
        """The same at the baseline."""
        return self._features(self.start)

    def _features(self, state: Mapping[str, Tensor]) -> Tensor:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[:] = [args[0].detach().clone()]

        with self._hooked(keep, self._trained_layers(LAYERS)), torch.no_grad():
            self.network.outputs(self.batch, state or None)
        n = batch_size(inputs_of(self.batch))
        if not seen:
            raise Undefined("the model ran no trained Linear or convolution: there is no last hidden layer")
        if len(seen[0]) != n:
            raise Undefined("the last layer's input has no row for each probe")
        return seen[0].reshape(n, -1).double().cpu()

    @cached_property
    def input_gradients(self) -> dict[str, Tensor]:
        """Linear module -> ∂f/∂(its input), [N, C, in] with positions as further examples; float64 on the CPU."""
        edges: dict[str, tuple[GradientEdge, int]] = {}
        layers = self._trained_layers((nn.Linear,))
        names = {id(module): name for name, module in layers.items()}
        repeated: set[str] = set()

        def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0] if args[0].requires_grad else args[0].clone().requires_grad_()
            name = names[id(module)]
            repeated.update({name} & set(edges))
            edges[name] = (get_gradient_edge(x), x.shape[-1])
            return (x, *args[1:])

        with self._hooked(keep, layers):
            f = self.network.outputs(self.batch, self.state or None)
        kept = {name: edge for name, edge in edges.items() if name not in repeated}  # tied uses have no one input
        if not kept:
            return {}
        grads = [
            torch.autograd.grad(column.sum(), [edge for edge, _ in kept.values()], retain_graph=True, allow_unused=True)
            for column in f.T
        ]
        found = {}
        for (name, (_, width)), columns in zip(kept.items(), zip(*grads, strict=True), strict=True):
            if all(g is not None for g in columns):
                found[name] = torch.stack([g.reshape(-1, width) for g in columns], dim=1).double().cpu()
        return found

    def _trained_layers(self, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
        trained = {id(p) for p in self.network.parameters.values()}
        return {
            name: module
            for name, module in self.network.module.named_modules()
            if isinstance(module, kinds) and id(getattr(module, "weight", None)) in trained
        }

    @contextmanager
    def _hooked(self, hook: Callable[..., Any], layers: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as hooks:
            for module in layers.values():
                hooks.enter_context(module.register_forward_pre_hook(hook))
            yield

    # ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────
    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name -> (W, W_0) of every trained matrix, [out, in, …], float64 on the CPU."""
        start = self.start
        return {
            name: (p.detach().double().cpu(), start[name].double().cpu())
            for name, p in self.network.parameters.items()
            if p.ndim >= 2
        }

    # ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────
    def eps(self, outputs: Tensor) -> float:
        """The rounding of outputs, relative."""
        return torch.finfo(self.network.rounding(outputs.dtype)).eps

    def rounding(self, outputs: Tensor) -> float:
        """The norm of the rounding error of the outputs [n, C] as they are now, as measured."""
        return self.once(
            "rounding", lambda: float(rounding_error(self.network, self.batch, self.state, outputs).norm())
        )

    def rounded_to(self, outputs: Tensor) -> str:
        """The type that makes it."""
        return str(self.network.rounding(outputs.dtype)).removeprefix("torch.")

    def gradient_steps(self, loss: LossAt) -> Iterator[tuple[Tensor, float]]:
        """(Δf [n, C], η) of one gradient step on the probes, each at half the η before; the parameters stay.

        The first η is eps^⅓·‖θ‖/‖g‖, where curvature and rounding weigh alike.
        """
        g = self._gradient(loss)
        now = {name: p.detach() for name, p in self.network.parameters.items()}
        size = torch.stack([v.double().norm() for v in g.values()]).norm()
        if size == 0:
            raise Undefined("the gradient on the probes is zero")
        length = float(torch.stack([p.double().norm() for p in now.values()]).norm() / size)
        before = self._without_graph({})
        lr = self.eps(before) ** (1 / 3) * length
        while True:
            after = self._without_graph({name: now[name] - lr * g[name] for name in g})
            yield (after.double() - before.double()).cpu(), lr
            lr /= 2

    @torch.no_grad()
    def _without_graph(self, swapped: Mapping[str, Tensor]) -> Tensor:
        return self.network.outputs(self.batch, {**self.state, **swapped} or None)

    def _gradient(self, loss: LossAt) -> dict[str, Tensor]:
        leaves = {name: p.detach().clone().requires_grad_() for name, p in self.network.parameters.items()}
        f = self.network.outputs(self.batch, {**self.state, **leaves})
        grads = torch.autograd.grad(f, list(leaves.values()), loss.gradient.to(f), allow_unused=True)
        pairs = zip(leaves, cast("tuple[Tensor | None, ...]", grads), strict=True)
        return {name: g for name, g in pairs if g is not None}

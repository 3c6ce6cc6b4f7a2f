"""A torch module as a spec at its own widths and initialisation, so that `kernel` predicts the mean of its K_0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from ntkwatch.infinite import translate
from ntkwatch.infinite.compose import Serial, Sum
from ntkwatch.infinite.initialisation import Origin, Weights, find_copies, has_nonzero_mean, origins
from ntkwatch.infinite.layers import Layer, State
from ntkwatch.infinite.parametrized import ConversionError, Step


def from_module(module: nn.Module) -> Serial:
    """The infinitely wide network that `module` is a draw of.

    kernel(from_module(module), x) predicts the mean over initialisations of its trace-reduced kernel
    K_0[n, m] = (1/C) Σ_c Θ[n, c, m, c] in evaluation mode, up to O(1/width): every layer keeps its fan_in (so w_grad =
    fan_in, b_grad = 1 in the standard parametrization) and its initialisation, inferred from the weights themselves
    (`initialisation` says how each was read). Frozen parameters get no gradient. BatchNorm must not have seen a batch:
    it is then an affine map whose scale and shift contribute to the kernel.

    Understood, by torch.fx: Linear, Conv1d/2d, BatchNorm, LayerNorm, elementwise activations, average pooling, flatten,
    means over positions, sums of branches, products with constants, F.linear with own weights. Raises ConversionError
    naming what is not: softmax attention (no closed form at 1/√d), max pooling, grouped convolutions, tied weights, ….
    """
    return _Converter(module).spec()


def initialisation(module: nn.Module) -> dict[str, str]:
    """Parameter name -> the scheme it was read as, with the measured variance over the scheme's."""
    converter = _Converter(module)
    converter.spec()
    out = {}
    for w in converter.weights:
        origin = converter.origins[w.name]
        ratio = f" (measured {w.mean_square / origin.variance:.3f} of it)" if origin.variance else ""
        out[w.name] = origin.scheme + ratio
    return out


class _Converter:
    """One pass to read the steps of the graph, one to put them in series and in sums."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.module = module = nn.Sequential(module) if _is_leaf(module) else module
        self.graph = _trace(module)
        self.modules = dict(module.named_modules())
        self.steps: dict[fx.Node, Step] = {}
        self.weights: list[Weights] = []
        self.origins: dict[str, Origin] = {}
        self.visited: set[fx.Node] = set()
        self.end: fx.Node | None = None

    def spec(self) -> Serial:
        start = self._read()
        for w in self.weights:
            if has_nonzero_mean(w):
                raise ConversionError(
                    f"{w.name} has a mean that is not sampling error, so it is not a fresh zero-mean draw; "
                    "from_module describes a network at initialisation."
                )
        if (pair := find_copies(self.weights)) is not None:
            raise ConversionError(
                f"{pair[1]} is a copy of {pair[0]} (nn.TransformerEncoder copies its layers), so the two are not "
                "independent draws: call reset_parameters() on each layer first."
            )
        self.origins = origins(self.weights)
        assert self.end is not None
        dominators = _dominators(self.steps, start)
        spec = Serial(*self._chain(self.end, start, dominators))
        try:
            spec.state(State.OTHER, set())
        except ValueError as error:
            raise ConversionError(str(error)) from error
        return spec

    def _read(self) -> fx.Node:
        """Fills `steps`; returns the input."""
        start: fx.Node | None = None
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.users:
                if start is not None:
                    raise ConversionError(f"The module takes several inputs ({start} and {node}); it must take one.")
                start = node
                self.steps[node] = Step([], [], channels_first=False)
            elif node.op == "output":
                self.end = node.args[0] if isinstance(node.args[0], fx.Node) else None
            elif any(n in self.steps for n in node.all_input_nodes):
                self._add(node)
        if start is None or self.end not in self.steps:
            raise ConversionError("The module's output must be one tensor computed from its input.")
        return start

    def _add(self, node: fx.Node) -> None:
        step = translate.step(self, node)
        if step is not None:
            self.steps[node] = step

    def _chain(self, node: fx.Node, stop: fx.Node, dominators: dict[fx.Node, list[fx.Node]]) -> list[Layer]:
        """The layers from `stop` to `node`."""
        layers: list[Layer] = []
        while node is not stop:
            if node in self.visited:
                raise ConversionError(f"{node.name} is used by several branches, which are then correlated.")
            self.visited.add(node)
            step = self.steps[node]
            if step.mixed:
                raise ConversionError(f"{node.name} rearranges channels, which converts in attention only.")
            if len(step.sources) == 1:
                layers += [make(self.origins) for make in reversed(step.layers)]
                node = step.sources[0]
                continue
            meet = _meeting(step.sources, dominators)
            try:
                layers.append(Sum(*[Serial(*self._chain(s, meet, dominators)) for s in step.sources]))
            except ConversionError:
                raise
            except ValueError as error:
                raise ConversionError(f"{node.name}: {error}") from error
            node = meet
        return layers[::-1]

    def register(self, weights: Weights) -> str:
        """Remembers a weight to find the origin of; refuses one that is used twice."""
        if any(w.value is weights.value for w in self.weights):
            raise ConversionError(f"{weights.name} is used twice; shared weights have no closed form here.")
        named = replace(weights, name=self.names.get(id(weights.value), weights.name))
        self.weights.append(named)
        return named.name


def _is_leaf(m: nn.Module) -> bool:
    return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


class _Tracer(fx.Tracer):
    """Follows modules without their hooks: a hook of the user's must never be handed what is no tensor."""

    proxy_buffer_attributes = True  # masks are cut to the length of the input

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        return m.forward(*args, **kwargs)


def _trace(module: nn.Module) -> fx.Graph:
    modes = {m: m.training for m in module.modules()}
    try:
        for m in modes:
            m.training = False  # some forwards ask
        return _Tracer().trace(module)
    except Exception as error:
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise ConversionError(
            f"torch.fx cannot trace {type(module).__name__}: {reason.rstrip('.')}. "
            "Convert a part whose control flow is fixed."
        ) from error
    finally:
        for m, training in modes.items():
            m.training = training


def _dominators(steps: dict[fx.Node, Step], start: fx.Node) -> dict[fx.Node, list[fx.Node]]:
    """node -> the nodes that every path from the input to it passes, in order."""
    out: dict[fx.Node, list[fx.Node]] = {start: [start]}
    for node, step in steps.items():
        if node is not start:
            first, *rest = (out[s] for s in step.sources)
            out[node] = [d for d in first if all(d in other for other in rest)] + [node]
    return out


def _meeting(sources: list[fx.Node], dominators: dict[fx.Node, list[fx.Node]]) -> fx.Node:
    """The last node that all sources depend on."""
    first, *rest = (dominators[s] for s in sources)
    return next(d for d in reversed(first) if all(d in other for other in rest))

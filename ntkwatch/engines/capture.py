"""One forward pass and C backward passes to the activations → a per-example factor for every trained parameter.

Going up the graph from a parameter, the first node whose output gradient can be told apart by example is where its
per-example gradient is read off. Nodes below it (a transpose, weight norm, a lookup of position embeddings) depend on
parameters alone; the gradient is pulled back through them for each example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ntkwatch.engines.factors import Dense, Factor, Outer, add, densify
from ntkwatch.engines.graph import Graph, Layout, Scattered, digits, edges, find_layout, pull, walk
from ntkwatch.engines.rules import Use, factor, operand_shape
from ntkwatch.model import Network, UnsupportedModel, batch_size, inputs_of, take

_FEW = (
    3  # probes that the layouts are read from: the fewest that tell [n, T] from [T, n] and from T = n by their values
)

# Nodes that only rearrange entries: always crossed, so that a weight is met where it is multiplied.
_REARRANGE = (
    "TBackward0",
    "TransposeBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "AliasBackward0",
    "PermuteBackward0",
)


@dataclass(frozen=True)
class Separation:
    """Where examples come apart: boundary edges (node number, input, layout), and the shared nodes below them."""

    n: int
    signature: tuple[str, ...]
    boundary: tuple[tuple[int, int, Layout | Scattered], ...]
    shared: frozenset[int]
    sure: bool  # regular layouts, told apart beyond doubt: they hold for more probes of the same shape too


@dataclass(frozen=True)
class Captured:
    """Factors and the rule each came by, per parameter that the outputs depend on; and the outputs [n, C]."""

    factors: dict[str, Factor]
    rules: dict[str, str]
    outputs: Tensor


def capture(
    network: Network,
    x: Any,
    state: Mapping[str, Tensor] | None = None,
    *,
    summed: bool = False,
    recipe: Separation | None = None,
) -> Captured:
    """Per-example factors of every trained parameter at `x`.

    Args:
        summed: take Σ_c f_c for the one output (the "sum" kernel needs no more).
        recipe: from `separate_few`, to save reading the layouts again.

    Raises:
        UnsupportedModel: examples are coupled, or the outputs depend on no trained parameter.
    """
    leaves = leaves_at(network, state)
    f = outputs_at(network, x, state, leaves)
    if f.grad_fn is None:
        raise UnsupportedModel(
            "the outputs depend on no trained parameter (was forward run under no_grad, or detached?)"
        )
    graph = walk(f, leaves)
    n = f.shape[0]
    if recipe is None or not _transfers(recipe, graph, n):
        recipe = separate(graph, f, n)
    cotangents = _cotangents(f, summed)
    grads = backward(f, graph, sorted({number for number, _, _ in recipe.boundary}), cotangents)
    return Captured(*_collect(graph, recipe, grads, leaves, n, len(cotangents)), f.detach())


def leaves_at(network: Network, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors that stand for the trained parameters in the graph: the module's own, or fresh ones of `state`."""
    chosen: dict[str, Tensor] = {}
    for name, p in network.parameters.items():
        own = (state or {}).get(name, p)
        chosen[name] = own if own is p and p.requires_grad else own.detach().requires_grad_()
    return chosen


def outputs_at(network: Network, x: Any, state: Mapping[str, Tensor] | None, leaves: Mapping[str, Tensor]) -> Tensor:
    """f(x) [n, C] with a graph to `leaves`."""
    swapped = {name: t for name, t in leaves.items() if t is not network.parameters[name]}
    return network.outputs(x, {**(state or {}), **swapped})


def few(x: Any) -> Any:
    """The first probes, as few as tell layouts apart."""
    return take(x, slice(0, _FEW))


def separate_few(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> Separation | None:
    """The layouts read from a few probes; None where only those of the very batch can be trusted.

    Raises:
        UnsupportedModel: an example's output depends on the other examples, or is random in evaluation mode.
    """
    check_uncoupled(network, x, state)
    leaves = leaves_at(network, state)
    f = outputs_at(network, few(x), state, leaves)
    if f.grad_fn is None:
        return None
    graph = walk(f, leaves)
    found = separate(graph, f, f.shape[0])
    return found if found.sure and not graph.routes else None


def check_uncoupled(network: Network, x: Any, state: Mapping[str, Tensor] | None = None) -> None:
    """Raises UnsupportedModel where an example's output depends on which others are in its batch."""
    n = min(_FEW, batch_size(inputs_of(x)))
    if n < 2:
        return
    with torch.no_grad():
        whole, again = network.outputs(take(x, slice(0, n)), state), network.outputs(take(x, slice(0, n)), state)
        part = network.outputs(take(x, slice(0, n - 1)), state)
    limit = torch.finfo(whole.dtype).eps ** 0.5 * whole.abs().max()
    if bool(((whole - again).abs() > limit).any()):
        raise UnsupportedModel(
            "two forward passes on the same probes differ: the model draws random numbers in eval mode"
        )
    if bool(((whole[: n - 1] - part).abs() > limit).any()):
        raise UnsupportedModel(
            f"an example's output depends on the other examples of its batch{_suspect(network)}: "
            "the per-example kernel does not exist"
        )


def _suspect(network: Network) -> str:
    """The module that most likely couples examples, in words."""
    for name, module in network.module.named_modules():
        norm = isinstance(module, torch.nn.modules.batchnorm._NormBase)
        if norm and "Instance" not in type(module).__name__ and (module.training or not module.track_running_stats):
            return f" (module {name or 'itself'}, {type(module).__name__}, normalises by the batch's own statistics)"
    return ""


def separate(graph: Graph, f: Tensor, n: int) -> Separation:
    """Finds, going up from the leaves, the nodes at which examples come apart.

    Raises:
        UnsupportedModel: some parameter's gradient cannot be told apart by example anywhere.
    """
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    shared: set[Node] = set()
    boundary: dict[tuple[int, int], Layout | Scattered] = {}
    layouts: dict[Node, tuple[Layout | Scattered | None, bool]] = {}
    sure, frontier = True, list(graph.leaves.values())
    while frontier:
        shared.update(frontier)
        above = list(dict.fromkeys(node for child in frontier for node, _ in graph.consumers[child]))
        asked = [node for node in above if node not in layouts and not _rearranges(node)]
        layouts.update(_read_layouts(graph, f, asked, n))
        for child in frontier:
            for node, k in graph.consumers[child]:
                layout = None if _rearranges(node) else layouts[node][0]
                if layout is not None:
                    boundary[numbers[node], k] = layout
                    sure = sure and layouts[node][1] and isinstance(layout, Layout)
                elif node is graph.root:
                    raise UnsupportedModel(_inseparable(graph, child))
        crossed = [node for node in above if _rearranges(node) or layouts[node][0] is None]
        frontier = [node for node in crossed if node not in shared]
    edges_found = tuple((i, k, layout) for (i, k), layout in sorted(boundary.items(), key=lambda item: item[0]))
    return Separation(n, graph.signature, edges_found, frozenset(numbers[node] for node in shared), sure)


def _inseparable(graph: Graph, node: Node) -> str:
    names = [name for name, leaf in graph.leaves.items() if _reaches(node, leaf)]
    return (
        f"the gradients of {', '.join(names[:3])} cannot be told apart by example: examples are coupled in the model, "
        "and the per-example kernel does not exist"
    )


def _reaches(node: Node, leaf: Node) -> bool:
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        if here is leaf:
            return True
        new = [child for child, _ in here.next_functions if child is not None and child not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _rearranges(node: Node) -> bool:
    return node.name() in _REARRANGE


def _read_layouts(
    graph: Graph, f: Tensor, nodes: Sequence[Node], n: int
) -> dict[Node, tuple[Layout | Scattered | None, bool]]:
    """The layout of each node's output gradients, from 1 + digits backward passes."""
    if not nodes:
        return {}
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(f.shape, generator=generator, dtype=torch.float64).to(f.device, f.dtype) + 0.5
    codes = [code.to(f.device, f.dtype)[:, None] for code in digits(n, f.dtype)]
    passes = [_backward_once(f, graph, nodes, u * code) for code in (torch.ones_like(codes[0]), *codes)]
    found: dict[Node, tuple[Layout | Scattered | None, bool]] = {}
    for node in nodes:
        readings = [
            find_layout(passes[0][node][i], [p[node][i] for p in passes[1:]], n)  # type: ignore[arg-type, misc]
            for i, g in enumerate(passes[0][node])
            if g is not None
        ]
        found[node] = _common(readings)
    return found


def _common(readings: Sequence[tuple[Layout | Scattered | None, bool]]) -> tuple[Layout | Scattered | None, bool]:
    """One layout for all outputs of a node: they are few, and mostly one."""
    if not readings:
        return Layout(0, 1), False
    first, sure = readings[0]
    if all(layout == first for layout, _ in readings[1:] if isinstance(first, Layout)):
        return first, sure and all(also for _, also in readings)
    return None, True


def _backward_once(
    f: Tensor, graph: Graph, nodes: Sequence[Node], cotangent: Tensor
) -> dict[Node, list[Tensor | None]]:
    wanted = edges(graph, nodes)
    grads = iter(torch.autograd.grad([f], wanted, [cotangent], retain_graph=True, allow_unused=True))
    return {node: [next(grads) for _ in graph.outputs_used[node]] for node in nodes}


def _transfers(recipe: Separation, graph: Graph, n: int) -> bool:
    """Whether layouts read from a few probes hold in this graph too."""
    if recipe.signature != graph.signature or (n == 1) != (recipe.n == 1):
        return False
    for number, _, layout in recipe.boundary:
        node: Any = graph.nodes[number]
        for used in graph.outputs_used[node]:
            if not isinstance(layout, Layout) or not layout.fits(tuple(node._input_metadata[used].shape), n):
                return False
    return True


def _cotangents(f: Tensor, summed: bool) -> Tensor:
    """[C, n, C]: one output after the other, for all examples at once; [1, n, C] of ones when summed."""
    n, outputs = f.shape
    if summed:
        return torch.ones(1, n, outputs, dtype=f.dtype, device=f.device)
    return torch.eye(outputs, dtype=f.dtype, device=f.device)[:, None].expand(outputs, n, outputs)


def backward(
    f: Tensor, graph: Graph, numbers: Sequence[int], cotangents: Tensor
) -> dict[int, list[tuple[int, Tensor]]]:
    """Output gradients [C, *shape] of the numbered nodes, as (output number, gradient): batched, or one by one."""
    nodes = [graph.nodes[number] for number in numbers]
    wanted = edges(graph, nodes)
    import os
    try:
        if os.environ.get("LOOP"): raise RuntimeError("x")
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            [f], wanted, [cotangents], retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError as error:
        if "allocate memory" in str(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        passes = [torch.autograd.grad([f], wanted, [c], retain_graph=True, allow_unused=True) for c in cotangents]
        grads = [None if each[0] is None else torch.stack(each) for each in zip(*passes, strict=True)]
    given = iter(grads)
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for number, node in zip(numbers, nodes, strict=True):
        pairs = [(used, next(given)) for used in graph.outputs_used[node]]
        found[number] = [(used, g.detach()) for used, g in pairs if g is not None]
    return found


def _collect(
    graph: Graph,
    recipe: Separation,
    grads: dict[int, list[tuple[int, Tensor]]],
    leaves: Mapping[str, Tensor],
    n: int,
    outputs: int,
) -> tuple[dict[str, Factor], dict[str, str]]:
    """Factors of boundary edges, carried to the parameters they belong to."""
    names = {leaf: name for name, leaf in graph.leaves.items()}
    parts: dict[str, list[Factor]] = {}
    rules: dict[str, list[str]] = {}
    below: dict[tuple[Node, int], list[Dense]] = {}
    for number, k, layout in recipe.boundary:
        node: Any = graph.nodes[number]
        if not grads[number]:
            continue
        filled: list[Tensor | None] = [None] * len(node._input_metadata)
        for used, g in grads[number]:
            filled[used] = g
        found, how = factor(Use(node, k, operand_shape(node, k), tuple(filled), layout, n))
        child, used = node.next_functions[k]
        leaf, carried = _carry(child, found)
        if leaf is not None:
            parts.setdefault(names[leaf], []).append(carried)
            rules.setdefault(names[leaf], []).append(how)
        else:
            below.setdefault((child, used), []).append(densify(found))
            for name in (name for leaf, name in names.items() if _reaches(child, leaf)):
                rules.setdefault(name, []).append(f"{how}, pulled back")
    for leaf, dense in _pull_back(graph, recipe, below, names, outputs, n).items():
        parts.setdefault(names[leaf], []).append(dense)
    return {name: add(parts[name]) for name in leaves if name in parts}, {
        name: " + ".join(dict.fromkeys(rules[name])) for name in leaves if name in parts
    }


def _carry(node: Node, found: Factor) -> tuple[Node | None, Factor]:
    """Carries a factor through nodes that keep its entries' order (or transpose an outer product) to the leaf."""
    reshaped = False
    while not hasattr(node, "variable"):
        if not _rearranges(node) or node.name() == "PermuteBackward0":
            return None, found
        if node.name() in ("TBackward0", "TransposeBackward0"):
            if reshaped or not isinstance(found, Outer) or not _last_two(node):
                return None, found
            found = Outer(found.a, found.g, not found.a_first)
        elif _changes_shape(node):
            reshaped = True
        child = node.next_functions[0][0]
        assert child is not None
        node = child
    return node, found


def _last_two(node: Any) -> bool:
    rank = len(node._input_metadata[0].shape)
    if node.name() == "TBackward0":
        return rank == 2
    dims = {d % rank if d < 2**62 else (d - 2**64) % rank for d in (node._saved_dim0, node._saved_dim1)}
    return rank >= 2 and dims == {rank - 1, rank - 2}


def _changes_shape(node: Any) -> bool:
    return tuple(node._input_metadata[0].shape) != operand_shape(node, 0)


def _pull_back(
    graph: Graph,
    recipe: Separation,
    below: dict[tuple[Node, int], list[Dense]],
    names: Mapping[Node, str],
    outputs: int,
    n: int,
) -> dict[Node, Dense]:
    """Per-example gradients of shared tensors → of the parameters they were made from, node after node."""
    arrived: dict[tuple[Node, int], Tensor] = {}
    for (node, used), dense in below.items():
        metadata: Any = node
        shape = metadata._input_metadata[used].shape
        arrived[node, used] = torch.stack([d.j for d in dense]).sum(0).reshape(outputs, n, *shape)
    result: dict[Node, Dense] = {}
    for number in sorted(recipe.shared):
        node = graph.nodes[number]
        if node in names:
            if (node, 0) in arrived:
                result[node] = Dense(arrived.pop((node, 0)).reshape(outputs, n, -1))
            continue
        ready = [arrived.pop((node, i), None) for i in range(len(node._input_metadata))]  # type: ignore[attr-defined]
        if all(g is None for g in ready):
            continue
        for k, (child, used) in enumerate(node.next_functions):
            if child is None or child not in graph.consumers or not _is_shared(graph, recipe, child):
                continue
            pulled = _pull_each(node, ready, k, operand_shape(node, k))
            arrived[child, used] = arrived[child, used] + pulled if (child, used) in arrived else pulled
    return result


def _is_shared(graph: Graph, recipe: Separation, node: Node) -> bool:
    return any(graph.nodes[number] is node for number in recipe.shared)


def _pull_each(node: Node, grads: Sequence[Tensor | None], k: int, shape: tuple[int, ...]) -> Tensor:
    """Input `k`'s gradient for every [C, n] of gradients."""
    given = [g for g in grads if g is not None]
    lead = given[0].shape[:2]
    flat = [g.flatten(0, 1) for g in given]

    def one(*each: Tensor) -> Tensor:
        values = iter(each)
        return pull(node, [None if g is None else next(values) for g in grads], k, shape)

    with torch.no_grad():
        try:
            stacked = torch.func.vmap(one)(*flat)
        except RuntimeError:
            stacked = torch.stack([one(*(g[i] for g in flat)) for i in range(len(flat[0]))])
    return stacked.unflatten(0, lead)

"""Every remedy that a message prints works when pasted: it is taken from the message, run, and its result is checked.

A row is a scene (the names that a message may use: `model`, `probes`, …), what is asked of it, and the kernel that is
right. A lambda after "outputs=" or "targets=" is passed on; other code is found by the row's pattern, whose groups
are evaluated: `probes` and `x` are asked again with, `model` and `do` are run first.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch import Monitor, NTKWatch, empirical_ntk
from ntkwatch.engines import sign_ntk

N, D = 5, 4
Scene = dict[str, Any]
Right = Callable[[nn.Module, int], Tensor]  # outputs [C] of example i


@dataclass(frozen=True)
class Row:
    scene: Callable[[], Scene]
    right: Right | None = None
    pattern: str = ""
    said: str = ""
    ask: Callable[..., Any] = empirical_ntk
    passed: Scene = field(default_factory=dict)
    found: tuple[str, ...] = ("outputs",)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


X = noise(N, D)
Y = torch.tensor([0, 1, 1, 0, 1])


def lambda_in(message: str, name: str, scene: Scene) -> Any:
    """The lambda after "name=": as much of the text as is one, whose names are known."""
    start = message.find(f"{name}=lambda")
    code = message[start + len(name) + 1 :] if start >= 0 else ""
    for end in range(len(code), 0, -1):
        try:
            tree = ast.parse(code[:end].strip(), mode="eval").body
        except SyntaxError:
            continue
        if not isinstance(tree, ast.Lambda):
            continue
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        known = {*scene, "torch", "setattr", "len", *(each.arg for each in tree.args.args)}
        if names <= known:
            return eval(code[:end].strip(), {"torch": torch, **scene})
    return None


def naive(model: nn.Module, right: Right, n: int) -> Tensor:
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    for i in range(n):
        columns = [torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True) for y in right(model, i)]
        flat = [[torch.zeros_like(p) if g is None else g for g, p in zip(c, parameters, strict=True)] for c in columns]
        rows.append(torch.stack([torch.cat([g.flatten() for g in column]) for column in flat]))
    j = torch.stack(rows).double()
    return torch.einsum("ncp,mcp->nm", j, j) / j.shape[1]


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(D, 3).double()


def made(forward: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A linear layer under a forward of its own, with attributes that are copied for it."""
    module = type("Made", (Base,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def cell(h: Tensor | None, x: Tensor, net: nn.Module) -> Tensor:
    return torch.tanh(net(x) + (0.5 * h if h is not None and len(h) == len(x) else 0))


def keeps_tensor(self: Any, x: Tensor) -> Tensor:
    self.h = cell(self.h, x, self.net).detach()
    return cell(self.h, x, self.net) if self.h is None else torch.tanh(self.net(x) + 0.5 * self.h)


def keeps_none(self: Any, x: Tensor) -> Tensor:
    out = cell(self.h, x, self.net)
    self.h = out.detach()
    return out


def keeps_list(self: Any, x: Tensor) -> Tensor:
    out = cell(self.past[-1] if self.past else None, x, self.net)
    self.past.append(out.detach())
    return out


def keeps_tuple(self: Any, x: Tensor) -> Tensor:
    out = cell(self.state[0] if self.state else None, x, self.net)
    self.state = (out.detach(), out.detach() ** 2)
    return out


def keeps_dict(self: Any, x: Tensor) -> Tensor:
    out = cell(self.cache.get("h"), x, self.net)
    self.cache["h"] = out.detach()
    return out


def keeps_two(self: Any, x: Tensor) -> Tensor:
    out = cell(self.h, x, self.net) + cell(self.c, 2 * x, self.net)
    self.h, self.c, self.last_seen = out.detach(), 3 * out.detach(), x.detach()
    return out


def counts(self: Any, x: Tensor) -> Tensor:
    self.t += 1
    return self.net(x) * self.t


def in_a_buffer(self: Any, x: Tensor) -> Tensor:
    out = torch.tanh(self.net(x) + self.running)
    self.running = self.running + out.detach().mean(0)
    return out


def with_buffer() -> nn.Module:
    model = made(in_a_buffer)
    model.register_buffer("running", torch.zeros(3, dtype=torch.float64))
    return model


def once(model: Any, i: int) -> Tensor:
    return torch.tanh(model.net(X[i]))


class Inside(nn.Module):
    """State of a module that is in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([made(keeps_none, h=None), nn.Linear(3, 2).double()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


A = noise(9, 9).softmax(1)
NODES, EDGES = noise(9, D), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 0, 4, 3, 6, 7, 8, 5]])


def over_a(self: Any, x: Tensor) -> Tensor:
    return self.A @ self.net(x)


def over_edges(self: Any, x: Tensor, edges: Tensor) -> Tensor:
    h = self.net(x)
    return h.index_add(0, edges[1], h[edges[0]])


def with_a() -> nn.Module:
    model = made(over_a)
    model.register_buffer("A", A)
    return model


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e = nn.EmbeddingBag(12, 3).double()

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.e(tokens, offsets)


class DataBatch:
    """As torch_geometric's: graphs one after the other, with the graph of each node."""

    def __init__(self, x: Tensor, edge_index: Tensor, batch: Tensor, y: Tensor) -> None:
        self.x, self.edge_index, self.batch, self.y = x, edge_index, batch, y

    def to(self, device: Any) -> DataBatch:
        return DataBatch(*(t.to(device) for t in (self.x, self.edge_index, self.batch, self.y)))


def of_graphs(self: Any, data: DataBatch) -> Tensor:
    h = over_edges(self, data.x, data.edge_index)
    return torch.zeros(3, 3, dtype=h.dtype).index_add(0, data.batch, torch.tanh(h))


GRAPHS = DataBatch(NODES, EDGES, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 1, 0]))
TOKENS, OFFSETS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5]), torch.tensor([0, 2, 5, 6])
BAGS = (slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 9))


def one(self: Any, x: Tensor) -> Tensor:
    return self.net(x)


def linear(model: Any, i: int) -> Tensor:
    return model.net(X[i])


class Swapped(NamedTuple):
    y: Tensor
    x: Tensor


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, 3).double()


ROWS: dict[str, Row] = {}


def state(name: str, model: Callable[[], nn.Module], right: Right = once, kept: str = "h") -> None:
    ROWS[f"state: {name}"] = Row(
        lambda: {"model": model(), "probes": X}, right, said=rf"keeps state between calls \({re.escape(kept)}"
    )


state("None before the first call", lambda: made(keeps_none, h=None))
state("a tensor of an earlier call", lambda: made(keeps_none, h=noise(7, 3)))
state("a list", lambda: made(keeps_list, past=[]), kept="past")
state("a list of earlier calls", lambda: made(keeps_list, past=[noise(N, 3)]), kept="past")
state("a tuple", lambda: made(keeps_tuple, state=()), kept="state")
state("a dict", lambda: made(keeps_dict, cache={}), kept="cache")
state("a counter", lambda: made(counts, t=0), linear, "t")
state("a buffer", with_buffer, kept="running")
state("of a module within", Inside, lambda m, i: m.layers[1](once(m.layers[0], i)), "layers.0.h")
state(
    "two, and one that is only written",
    lambda: made(keeps_two, h=None, c=None, last_seen=None),
    lambda m, i: once(m, i) + torch.tanh(m.net(2 * X[i])),
    "h, c",
)


def to_a_callback(model: nn.Module, probes: Any) -> NTKWatch:
    return NTKWatch(probes)


def twice(batch: Any) -> Scene:
    """Under the name that the message has for what was passed."""
    return {"batch": batch, "probes": batch}


NUMBERS = r"pass their numbers as probes, (?P<x>torch\.arange\(\d+\))"
ROWS |= {
    "nodes, related by a buffer": Row(
        lambda: {"model": with_a(), **twice(NODES)}, lambda m, i: (A @ m.net(NODES))[i], NUMBERS,
        "each row of x is taken as one example.*|perhaps through A",
    ),
    "nodes, related by edges": Row(
        lambda: {"model": made(over_edges), **twice({"x": NODES, "edges": EDGES})},
        lambda m, i: over_edges(m, NODES, EDGES)[i], NUMBERS, "each row of x is taken",
    ),
    "nodes, through outputs= of one's own": Row(
        lambda: {"model": made(over_edges), **twice((EDGES.T, NODES)), "outputs": lambda m, b: m(b[1], b[0].T)},
        lambda m, i: over_edges(m, NODES, EDGES)[i], NUMBERS,
        passed={"outputs": lambda m, b: m(b[1], b[0].T)},
    ),
    "tokens and offsets": Row(
        lambda: {"model": Bag(), **twice({"tokens": TOKENS, "offsets": OFFSETS})},
        lambda m, i: m.e(TOKENS[BAGS[i]][None])[0], NUMBERS, "each row of offsets is taken",
    ),
    "rows relative to the first": Row(
        lambda: {"model": made(lambda self, x: self.net(x) - self.net(x)[:1]), **twice(X)},
        lambda m, i: m.net(X[i]) - m.net(X[0]), NUMBERS, "depends on the other examples of its batch",
    ),
    "a batch of graphs": Row(
        lambda: {"model": made(of_graphs), **twice(GRAPHS)}, lambda m, i: of_graphs(m, GRAPHS)[i],
        r"pass their numbers as probes, (?P<x>torch\.arange\(len\(model\(batch\)\)\))", "got DataBatch",
        found=("outputs", "targets"),
    ),
    "a batch of graphs, to NTKWatch": Row(
        lambda: {"model": made(of_graphs), **twice(GRAPHS)}, lambda m, i: of_graphs(m, GRAPHS)[i],
        r"pass their numbers as probes, (?P<x>torch\.arange\(len\(model\(batch\)\)\))", "got DataBatch",
        to_a_callback, found=("outputs", "targets"),
    ),
}  # fmt: skip

# what was taken as the inputs is something else
ROWS |= {
    name: Row(lambda make=make, probes=probes: {"model": make(), "probes": probes}, right, said=said, ask=Monitor,
              found=("outputs", "targets"))
    for name, make, probes, right, said in (
        ("(y, x)", lambda: made(one), (Y, X), linear, "does with"),
        ("namedtuple(y, x)", lambda: made(one), Swapped(Y, X), linear, "does with"),
        ("img and cls", lambda: made(one), {"img": X, "cls": Y}, linear, "a dict of img, cls"),
        ("(id, x, y)", lambda: made(one), (torch.arange(N), X, Y), linear, "does with"),
        ("otherwise named", lambda: made(lambda self, image, a=1: self.net(image)), {"im": X, "c": Y}, linear, "with"),
        ("two otherwise named", lambda: made(lambda self, a, b: self.net(a) * self.net(b)),
         {"l": X, "r": 2 * X, "c": Y}, lambda m, i: m.net(X[i]) * m.net(2 * X[i]), "does with"),
        ("no forward", lambda: made(nn.Module.forward), (X, Y), linear, "model.net"),
        ("no forward, of Lightning's", NoForward, (X, Y), linear, "model.net"),
    )
}  # fmt: skip

# outputs that are not [n, C]
E = noise(N, 2, D)


def over_positions(model: Any, i: int) -> Tensor:
    return model.net(E[i]).mean(0)


ROWS |= {
    f"outputs: {name}": Row(lambda f=f: {"model": made(f), "probes": E}, right, said="outputs=")
    for name, f, right in (
        ("[n, T, C]", lambda self, x: self.net(x), over_positions),
        ("[n, T, C] under logits", lambda self, x: SimpleNamespace(logits=self.net(x)), over_positions),
        ("[n, T, C] first of a tuple", lambda self, x: (self.net(x), x), over_positions),
        ("[n, C, H, W]", lambda self, x: self.net(x).reshape(-1, 3, 1, 2),
         lambda m, i: m.net(E[i]).reshape(3, 2).mean(1)),
        ("[n * T, C]", lambda self, x: self.net(x.flatten(0, 1)), lambda m, i: m.net(E[i]).flatten()),
        ("complex", lambda self, x: torch.complex(self.net(x[:, 0]), self.net(x[:, 1])),
         lambda m, i: torch.stack([m.net(E[i, 0]), m.net(E[i, 1])], 1).flatten()),
        ("a dict", lambda self, x: {"score": self.net(x[:, 0]), "more": x}, lambda m, i: m.net(E[i, 0])),
        ("a hidden state", lambda self, x: {"last_hidden_state": self.net(x)}, over_positions),
        ("an object", lambda self, x: SimpleNamespace(name="a", score=self.net(x[:, 0])), lambda m, i: m.net(E[i, 0])),
        ("a tensor in a tuple in a tuple", lambda self, x: ((self.net(x[:, 0]), 1), 2), lambda m, i: m.net(E[i, 0])),
    )
}  # fmt: skip


def conv(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double()


def words() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)).double()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 3)).double()


P12, IMAGES = noise(N, 12), noise(N, 3, 4, 4)
IDS = torch.arange(1, 11).remainder(9).reshape(N, 2)
MISFITS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {  # what is given, what the model takes
    "float32": (mlp, P12.float(), P12.float().double()),
    "whole numbers": (mlp, P12.mul(9).long(), P12.mul(9).long().double()),
    "images": (mlp, noise(N, 3, 2, 2), noise(N, 3, 2, 2).flatten(1)),
    "no column": (lambda: nn.Linear(1, 2).double(), P12[:, 0], P12[:, :1]),
    "float tokens": (words, IDS.double(), IDS),
    "channels last": (lambda: conv(3), IMAGES.permute(0, 2, 3, 1).contiguous(), IMAGES),
    "no channel": (lambda: conv(1), IMAGES[:, 0], IMAGES[:, :1]),
}  # fmt: skip
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "alone": lambda x: x,
    "with targets": lambda x: (x, Y),
    "by name": lambda x: {"input": x, "y": Y},
}
for name, (make, given, taken) in MISFITS.items():
    for form, wrap in FORMS.items():
        scene = lambda make=make, given=given, wrap=wrap: {"model": make(), "probes": wrap(given)}  # noqa: E731
        right = lambda m, i, taken=taken: m(taken[i : i + 1])[0]  # noqa: E731
        ROWS[f"{name}, {form}, converted"] = Row(scene, right, r", (?P<x>probes[^ ,;]*\.\w+\([^;]*?\))[,;]", found=())
        ROWS[f"{name}, {form}, in outputs="] = Row(scene, right)
ROWS["another type of model"] = Row(
    lambda: {"model": mlp(), "probes": P12.float()},
    lambda m, i: m(P12[i].float()),
    r"(?P<do>model\.to\([^)]*\))",
    found=(),
)

# what is no batch
TAKE = r"take a batch of it, (?P<x>.*)"


def no_batch(name: str, make: Callable[[], Any], pattern: str, ask: Callable[..., Any] = empirical_ntk) -> None:
    """A scene that has what is given for probes under the name that its kind has in the message."""

    def scene() -> Scene:
        given = make()
        return {"model": made(one), "DataLoader": DataLoader, "probes": given, name.split(",")[0]: given}

    ROWS[f"no batch: {name}"] = Row(scene, linear, pattern, found=(), ask=ask)


no_batch("loader", lambda: DataLoader(TensorDataset(X, Y), N), TAKE)
no_batch("dataset", lambda: TensorDataset(X, Y), TAKE)
no_batch("iterator", lambda: iter([(X, Y)]), TAKE)
no_batch(
    "loader, to NTKWatch", lambda: DataLoader(TensorDataset(X, Y), N), r"a batch of it, (?P<x>.*), or", to_a_callback
)
no_batch("dataset, to NTKWatch", lambda: TensorDataset(X, Y), r"a batch of it, (?P<x>.*), or", to_a_callback)
no_batch("sparse", lambda: X.to_sparse(), r"give (?P<x>probes\.to_dense\(\))")
no_batch("example", lambda: X[0], r"a row, (?P<x>probes\.unsqueeze\(0\))")
no_batch("dict", lambda: {"img": X, "cls": Y}, r"the tensor alone, (?P<x>probes\['img'\])")
no_batch("dict, in a tuple", lambda: ({"img": X, "more": X}, Y), r"the tensor alone, (?P<x>probes\[0\]\['img'\])")
no_batch("inference", lambda: of_inference_mode(), r"give (?P<x>probes\.clone\(\))")


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return X + 0


def frozen() -> nn.Module:
    return made(one).requires_grad_(False)


class Branches(Base):
    """Its control flow depends on values, which torch.func cannot transform."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x[0, 0] > -1e9 else x


ROWS |= {
    "a frozen model": Row(
        lambda: {"model": frozen(), "probes": X}, linear, r"unfreeze some, (?P<do>model.requires_grad_\(True\))",
        found=(),
    ),
    "an engine that cannot": Row(
        lambda: {"model": Branches(), "probes": X}, linear, r"use engine=(?P<engine>'\w+')",
        passed={"engine": "functional"}, found=(),
    ),
    "signs of a sum": Row(
        lambda: {"model": made(one), "probes": X}, None, r"take (?P<reduction>'\w+')", passed={"reduction": "sum"},
        ask=sign_ntk, found=(),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("case", ROWS)
def test_what_is_printed_works_when_it_is_pasted(case: str) -> None:
    row, scene = ROWS[case], ROWS[case].scene()
    model, passed = scene["model"], dict(row.passed)
    with pytest.raises(Exception) as caught:  # noqa: PT011  any kind: the message is what is looked at
        row.ask(model, scene["probes"], **passed)
    message = str(caught.value)
    assert re.search(row.said, message), f"{case}: no {row.said!r} in {message!r}"
    again: Scene = {}
    for name in row.found:
        again[name] = lambda_in(message, name, scene)
        assert again[name] is not None, f"{case}: no {name}=lambda that can be run in {message!r}"
    code = re.search(row.pattern, message)
    assert code is not None, f"{case}: no {row.pattern!r} in {message!r}"
    ready = {
        name: eval(text, {"torch": torch, **scene}) for name, text in code.groupdict().items() if name != "outputs"
    }
    ready.pop("do", None)
    probes = ready.pop("x", scene["probes"])
    if row.right is None:
        row.ask(model, probes, **{**passed, **again, **ready})
        return
    targets = again.pop("targets", None)
    found = empirical_ntk(model, probes, **{**passed, **again, **ready})
    want = naive(model, row.right, len(found))
    torch.testing.assert_close(found.to(want), want, rtol=1e-6, atol=1e-8, msg=f"{case}: {message}")
    monitor = Monitor(model, probes, targets, **again)
    torch.testing.assert_close(monitor.measure(0).kernel.to(want), want, rtol=1e-6, atol=1e-8, msg=f"{case}: {message}")
    if targets is not None:
        assert monitor.probes.targets is not None, case
        assert len(monitor.probes.targets) == len(found), case

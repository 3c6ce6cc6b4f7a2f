"""Network: parameters, batches and outputs as DESIGN's public API says."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, empirical_ntk, layer_ntks, plan
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import (
    Network,
    UnsupportedModel,
    batch_size,
    inputs_of,
    take,
    to_device,
)
from ntkwatch.model.batch_statistics import calibrated_statistics, running_statistics, untracked_statistics

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class Whole(nn.Module):
    """Takes a whole batch, as a LightningModule's forward may."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, batch: Any) -> Tensor:
        return self.a(batch["x"])


class Keywords(Whole):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return self.a(x) * scale


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.a, self.wrap = nn.Linear(3, 2), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.a(x))


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("name", "module", "batch"),
    [
        ("tensor", nn.Linear(3, 2), X),
        ("pair", nn.Linear(3, 2), (X, Y)),
        ("list", nn.Linear(3, 2), [X, Y]),
        ("one in a tuple", nn.Linear(3, 2), (X,)),
        ("triple", nn.Bilinear(3, 3, 2), (X, X, Y)),
        ("mapping, one argument", Whole(), {"x": X, "labels": Y}),
        ("mapping, keywords", Keywords(), {"x": X, "y": Y}),
        ("user mapping", Keywords(), UserDict(x=X, label=Y)),
        ("logits attribute", Returns(Logits), X),
        ("logits key", Returns(lambda f: {"logits": f}), X),
        ("tuple output", Returns(lambda f: (f, None)), X),
    ],
)
def test_batches_and_outputs(name: str, module: nn.Module, batch: Any) -> None:
    f = Network(module).outputs(batch)
    assert f.shape == (4, 2), name
    part = Network(module).outputs(take(batch, slice(1, 3)))
    assert torch.allclose(part, f[1:3]), f"{name}: rows 1 and 2"
    assert torch.allclose(Network(module).outputs(take(batch, [3, 0])), f[[3, 0]]), f"{name}: rows 3 and 0"
    assert batch_size(inputs_of(batch)) == 4, name
    assert type(to_device(batch, "cpu")) is type(batch), name
    labelled = name not in ("tensor", "one in a tuple") and not name.startswith(("logits", "tuple"))
    assert (Network(module).targets(batch) is not None) == labelled, name


def test_outputs_are_made_two_dimensional() -> None:
    assert Network(Returns(lambda f: f[:, 0])).outputs(X).shape == (4, 1)


def test_precedence_of_outputs_functions() -> None:
    module = nn.Linear(3, 2)
    module.ntk_outputs = lambda batch: module(batch) * 2  # type: ignore[assignment]
    assert torch.equal(Network(module).outputs(X), module(X) * 2)
    assert torch.equal(Network(module, lambda m, b: m(b) * 3).outputs(X), module(X) * 3)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (Returns(lambda f: f[:, None]), r"\(4, 1, 2\).*outputs="),
        (Returns(lambda f: f.mean(0)), r"\(2,\).*outputs="),
        (Returns(lambda f: f.mean()), r"\(\).*outputs="),
        (Returns(lambda f: "text"), r"str.*outputs="),
        (Returns(lambda f: f.argmax(1)), r"int64"),
    ],
)
def test_other_outputs_are_refused(module: nn.Module, names: str) -> None:
    with pytest.raises(UnsupportedModel, match=names):
        Network(module).outputs(X)


def test_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    net[1].weight = net[0].weight
    net[2].bias.requires_grad_(False)
    assert list(Network(net).parameters) == ["0.weight", "0.bias", "1.bias", "2.weight"]
    assert list(Network(net, params="*.bias").parameters) == ["0.bias", "1.bias"]
    assert list(Network(net, params=["2.*", "0.weight"]).parameters) == ["0.weight", "2.weight"]
    with pytest.raises(ValueError, match="head"):
        Network(net, params=["0.*", "head.*"])
    with pytest.raises(UnsupportedModel, match="no trained parameter"):
        Network(net.requires_grad_(False))
    with pytest.raises(UnsupportedModel, match="not initialised"):
        Network(nn.LazyLinear(2))


def test_state_swaps_parameters_and_buffers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    network = Network(net)
    before = network.outputs(X).detach()
    swapped = {"0.weight": torch.zeros(4, 3), "1.running_mean": torch.ones(4)}
    assert not torch.allclose(network.outputs(X, swapped), before)
    assert torch.equal(network.outputs(X), before)


def test_state_of_a_tied_weight_moves_both_places() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    assert torch.equal(Network(net).outputs(X, {"0.weight": 2 * torch.eye(3)}), 4 * X)


def test_compiled_and_wrapped_modules_are_unwrapped() -> None:
    inner = nn.Linear(3, 2)
    network = Network(torch.compile(inner, backend="eager"))  # type: ignore[arg-type]
    assert network.module is inner
    assert list(network.parameters) == ["weight", "bias"]


def test_calibration_equals_a_training_forward() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=1.0), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4),
                        nn.BatchNorm1d(4, momentum=1.0), nn.Linear(4, 2))  # fmt: skip
    x = torch.randn(6, 2, 5, 5)
    assert untracked_statistics(net)
    with leave_no_trace(net):
        found = calibrated_statistics(Network(net), [x])
    assert float(net[1].running_mean.abs().max()) == 0, "the module is left as it was"
    net(x)  # momentum 1 in training mode: running statistics become the batch's own
    for name, expected in running_statistics(net).items():
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert not untracked_statistics(net)


def test_calibration_pools_batches() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    x = torch.randn(10, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrated_statistics(Network(net), [x[:4], (x[4:], None)])
    assert torch.allclose(found["0.running_mean"], x.mean(0), atol=1e-6)
    assert torch.allclose(found["0.running_var"], x.var(0), atol=1e-6)


def test_leaves_without_examples_are_kept() -> None:
    batch = {"x": X, "scale": torch.tensor(2.0), "names": ["a", "b", "c", "d"], "positions": torch.arange(3)[None]}
    part = take(batch, slice(0, 2))
    assert part["x"].shape == (2, 3)
    assert part["scale"] == 2
    assert part["positions"].shape == (1, 3)
    with pytest.raises(ValueError, match="must hold a tensor"):
        batch_size("text")


def test_a_state_leaves_a_module_with_two_names_as_it_was() -> None:
    """torch's functional_call alone would leave the swapped weight behind."""
    shared, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = shared.weight
    net = nn.Sequential(shared, nn.Tanh(), shared, other)
    x, weight = torch.randn(4, 3), shared.weight
    network = Network(net)
    doubled = {name: 2 * p.detach() for name, p in network.parameters.items()}
    before = network.outputs(x)
    found = network.outputs(x, doubled)
    assert shared.weight is weight
    assert other.weight is weight
    assert torch.equal(network.outputs(x), before)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    assert torch.equal(found, network.outputs(x)), "every place has the weight of the state"


class Halves(nn.Module):
    """tanh, with a hook of forward's own that halves the gradient through it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / 2)
        return y


HOOKS: dict[str, Callable[[nn.Sequential], object]] = {
    "a parameter's": lambda net: net[0].weight.register_hook(lambda gradient: gradient * 0),
    "a parameter's, once accumulated": lambda net: net[0].weight.register_post_accumulate_grad_hook(
        lambda p: p.grad.zero_()
    ),
    "a module's": lambda net: net[1].register_full_backward_hook(lambda module, given, got: (given[0] * 0,)),
    "a module's, before": lambda net: net[1].register_full_backward_pre_hook(lambda module, got: (got[0] * 0,)),
}


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
def test_gradient_hooks_are_no_part_of_the_kernel_but_those_of_forward_are(engine: str) -> None:
    def net(middle: type[nn.Module] = nn.Tanh) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), middle(), nn.Linear(5, 2))

    expected = empirical_ntk(net(), X, engine=engine)
    for case, hook in HOOKS.items():
        hooked = net()
        hook(hooked)
        error = (empirical_ntk(hooked, X, engine=engine) - expected).norm() / expected.norm()
        assert error < 1e-6, f"{case} hook moved the kernel by {error:.1e}"
    first, last = layer_ntks(net(), X, engine=engine), layer_ntks(net(Halves), X, engine=engine)
    for name, kernel in first.items():
        share = 1 / 4 if name.startswith("0.") else 1
        torch.testing.assert_close(last[name], share * kernel, rtol=1e-5, atol=1e-9, msg=name)


def test_a_network_is_where_its_module_is_now() -> None:
    """The meta device stands in for another one, to which parameters would move as themselves."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    network = Network(module)
    kept = {name: t.clone() for name, t in {**network.parameters, **network.buffers}.items()}
    assert all(torch.equal(t, kept[name]) for name, t in network.placed(kept).items())
    module.double()
    assert {t.dtype for t in network.placed(kept).values()} == {torch.float64, torch.int64}
    module.to("meta")
    network.parameters = dict(module.named_parameters())
    assert network.device.type == "meta"
    assert {t.device.type for t in [*network.buffers.values(), *network.placed(kept).values()]} == {"meta"}


class Elsewhere(Tensor):
    """Says that it is on a GPU, with or without one: all that a parameter is asked for before a model runs."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device="cuda:0", requires_grad=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func}: there are no numbers here")


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def _with_weight(where: str, value: Callable[[Tensor], Tensor]) -> nn.Module:
    net = _net()
    module = net.get_submodule(where)
    module.weight = nn.Parameter(value(module.weight.detach()))
    return net


def _frozen_on_meta() -> nn.Module:
    net = _with_weight("2", lambda w: w.to("meta"))
    net[2].weight.requires_grad_(False)
    return net


def _buffer_on_meta() -> nn.Module:
    net = _net()
    net[1].running_mean = torch.empty(5, device="meta")
    return net


PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "all on meta": (lambda: _net().to("meta"), ("parameter 0.weight is on the meta device", "to_empty")),
    "one on meta": (lambda: _with_weight("2", lambda w: w.to("meta")), ("parameter 2.weight is on the meta device",)),
    "a frozen one on meta": (_frozen_on_meta, ("parameter 2.weight is on the meta device", "load it first")),
    "a buffer on meta": (_buffer_on_meta, ("buffer 1.running_mean is on the meta device", "load it first")),
    "two devices": (
        lambda: _with_weight("2", Elsewhere),
        ("on 2 devices (0.weight on cpu, 2.weight on cuda:0)", "put the model on one, as model.to('cpu')"),
    ),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("ask", [empirical_ntk, layer_ntks, plan, Monitor], ids=lambda ask: ask.__name__)
def test_a_model_that_is_not_on_one_device_is_refused(case: str, ask: Callable[..., Any]) -> None:
    make, parts = PLACES[case]
    with pytest.raises(UnsupportedModel) as caught:
        ask(make(), X)
    for part in parts:
        assert part in str(caught.value), f"{case}: no {part!r} in {str(caught.value)!r}"

"""The choice of engine, its self-check, plans, memory, number types and tangents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import UnsupportedModel, empirical_ntk, layer_ntks, memory, plan, planning
from ntkwatch.engines.auto import choose
from ntkwatch.engines.base import Kernel, reduce
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.engines.selfcheck import self_check
from ntkwatch.engines.tangent import jvp
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, take
from tests.support import cases_adversarial
from tests.support.cases import CASES, Lambda, build, find
from tests.support.oracles import gradients, naive_ntk, reduced

assert cases_adversarial
NET_X = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(6, 4))


def test_choice_gives_a_reason_of_one_line() -> None:
    for engine in ("auto", "layerwise", "functional"):
        chosen = choose(Network(NET_X[0]), NET_X[1], engine)
        assert "\n" not in chosen.reason
        assert chosen.engine.name in chosen.reason
    with pytest.raises(ValueError, match="'fast'"):
        choose(Network(NET_X[0]), NET_X[1], "fast")


class _Wrong(Layerwise):
    """An engine that forgets a layer."""

    def kernel(self, network: Network, *args: Any, **kwargs: Any) -> Kernel:
        right = super().kernel(network, *args, **{**kwargs, "layers": "full"})
        value = right.value - next(iter(right.layers.values()))
        return Kernel(value, {}, right.outputs, right.reduction, right.engine, right.precision, right.noise_floor)


def test_self_check_sees_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.engines.auto.Layerwise", _Wrong)
    chosen = choose(Network(NET_X[0]), NET_X[1])
    assert chosen.engine.name == "functional"
    assert "off by" in chosen.reason
    with pytest.raises(UnsupportedModel, match="off by"):
        choose(Network(NET_X[0]), NET_X[1], "layerwise")


def _mixed_up(change: Callable[[Tensor], Tensor], everywhere: bool) -> type[Layerwise]:
    """An engine whose kernel of the first parameter (or of every one) is changed."""

    class Mistaken(Layerwise):
        def kernel(self, network: Network, *args: Any, **kwargs: Any) -> Kernel:
            right = super().kernel(network, *args, **kwargs)
            first = next(iter(right.layers))
            layers = {name: change(t) if everywhere or name == first else t for name, t in right.layers.items()}
            return dataclasses.replace(right, value=torch.stack(list(layers.values())).sum(0), layers=layers)

    return Mistaken


def _pair(t: Tensor) -> Tensor:
    """One pair of probes, both ways, off by a tenth."""
    t = t.clone()
    t[0, :, 1] *= 1.1
    t[1, :, 0] *= 1.1
    return t


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "outputs of a pair exchanged": lambda t: t.transpose(1, 3),
    "outputs reversed": lambda t: t.flip(1, 3),
    "probes exchanged": lambda t: t[[1, 0, 2]][:, :, [1, 0, 2]],
    "probes reversed on one side": lambda t: t.flip(0),
    "no terms between outputs": lambda t: t * torch.eye(t.shape[1]).to(t)[:, None],
    "no terms between probes": lambda t: t * torch.eye(len(t)).to(t)[:, None, :, None],
    "one pair off by a tenth": _pair,
    "off by 2 %": lambda t: 1.02 * t,
    "one output off by 2 %": lambda t: t * torch.tensor([1.0, 1.02]).to(t)[:, None, None],
    "the mean over probes": lambda t: t.mean((0, 2), keepdim=True).expand_as(t),
    "left out": torch.zeros_like,
}

SLIGHT = "outputs of a pair exchanged"  # the right kernel is nearly symmetric in them


@pytest.mark.parametrize("everywhere", [True, False], ids=["every parameter", "one parameter"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_self_check_sees(mistake: str, everywhere: bool) -> None:
    for name in ("mlp", "conv2d", "transformer_encoder"):
        module, batch = build(find(name), torch.float32)
        with leave_no_trace(module):
            engine = _mixed_up(MISTAKES[mistake], everywhere)()
            error, worst = self_check(engine, Network(module), batch)
            exact, _ = self_check(Layerwise(), Network(module), batch)
        assert exact < 1e-5, f"{name}: {exact:.1e} without a mistake"
        slight = not everywhere or mistake == SLIGHT
        least = 30 * exact if slight else 3e-3  # what no rounding reaches; the tolerance
        assert error > least, f"{name}, {mistake}: off by {error:.1e} only, most in {worst}"


def test_random_models_are_refused() -> None:
    net = Lambda(lambda m, x: m.a(torch.nn.functional.dropout(x, 0.5, training=True)), a=nn.Linear(4, 2))
    with pytest.raises(UnsupportedModel, match="random"):
        empirical_ntk(net, torch.randn(5, 4))


def test_bad_arguments() -> None:
    net, x = NET_X
    for wrong, names in (({"reduction": "mean"}, "mean"), ({"precision": "half"}, "half"), ({"chunk_size": 0}, "0")):
        with pytest.raises(ValueError, match=names):
            empirical_ntk(net, x, **wrong)
    with pytest.raises(ValueError, match="empty"):
        empirical_ntk(net, x[:0])
    with pytest.raises(UnsupportedModel, match="NaN"):
        empirical_ntk(Lambda(lambda m, x: m.a(x) * float("nan"), a=nn.Linear(4, 2)), torch.ones(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "batch_norm", "transformer_encoder", "learned_positions", "norms"])
def test_number_types(name: str, dtype: torch.dtype) -> None:
    module, batch = build(find(name), dtype)
    exact = naive_ntk(*build(find(name), torch.float64))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    for precision in ("double", "single"):
        found = empirical_ntk(module, batch, precision=precision)  # type: ignore[arg-type]
        expected = torch.float64 if precision == "double" or dtype == torch.float64 else torch.float32
        assert found.dtype == expected, f"{name} in {dtype}: {precision}"
        off = float((found - reduced(exact, "trace")).norm() / reduced(exact, "trace").norm())
        assert off < tolerance, f"{name} in {dtype}, {precision}: off by {off:.1e}"


def test_double_products_keep_the_spectrum_of_near_duplicates() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(4, 8).repeat(6, 1) + 1e-3 * torch.randn(24, 8)
    eigenvalues = torch.linalg.eigvalsh(empirical_ntk(net, x))
    assert eigenvalues[0] > 0
    with leave_no_trace(net):
        kernel = Layerwise().kernel(Network(net), x)
    exact = torch.linalg.eigvalsh(empirical_ntk(net.double(), x.double()))
    assert float((eigenvalues - exact).abs().max() / exact[-1]) < kernel.noise_floor


def test_reduce_derives_what_is_determined() -> None:
    theta = naive_ntk(*build(find("mlp")))
    for target in ("trace", "blocks", "sum", "full"):
        assert torch.allclose(reduce(theta, "full", target), reduced(theta, target)), target  # type: ignore[arg-type]
    assert torch.allclose(reduce(reduced(theta, "blocks"), "blocks", "trace"), reduced(theta, "trace"))
    for source, target in (("trace", "full"), ("blocks", "sum"), ("sum", "trace")):
        with pytest.raises(ValueError, match="full"):
            reduce(reduced(theta, source), source, target)  # type: ignore[arg-type]


def test_layers_in_another_reduction() -> None:
    module, batch = build(find("mlp"))
    theta = naive_ntk(module, batch)
    with leave_no_trace(module):
        found = Layerwise().kernel(Network(module), batch, reduction="sum", layers="trace")
    assert torch.allclose(found.value, reduced(theta, "sum"))
    assert torch.allclose(torch.stack(list(found.layers.values())).sum(0), reduced(theta, "trace"))


def test_params_select_layers() -> None:
    net, x = NET_X
    layers = layer_ntks(net, x)
    assert torch.allclose(empirical_ntk(net, x, params="*.bias"), layers["0.bias"] + layers["2.bias"])


def test_state_evaluates_elsewhere() -> None:
    for name in ("batch_norm", "tied_linear", "parametrized"):
        module, batch = build(find(name))
        other, _ = build(find(name), seed=1)
        state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
        for engine in ("layerwise", "functional"):
            with leave_no_trace(module):
                chosen = choose(Network(module), batch, engine).engine
                found = chosen.kernel(Network(module), batch, reduction="full", state=state).value
            assert torch.allclose(found, naive_ntk(other, batch), rtol=1e-9), f"{name}, {engine}"


def test_nothing_is_left_behind() -> None:
    for case in [c for c in CASES if not c.refused and not c.heavy][:40]:
        module, batch = build(case)
        module.train()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        random = torch.random.get_rng_state()
        kernel = empirical_ntk(module, batch)
        assert not kernel.requires_grad, f"{case}: detached"
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), f"{case}: state"
        assert all(p.grad is None for p in module.parameters()), f"{case}: gradients"
        assert module.training, f"{case}: mode"
        assert torch.equal(random, torch.random.get_rng_state()), f"{case}: random state"


@pytest.mark.parametrize("name", ["mlp", "conv2d", "norms", "transformer_encoder", "learned_positions"])
@pytest.mark.parametrize("n", [3, 12])
def test_peak_memory_is_predicted(name: str, n: int) -> None:
    module, batch = build(find(name), torch.float32)
    x = torch.cat([batch] * 4)[:n]
    predicted = plan(module, x).peak_bytes
    network, engine = Network(module), Layerwise()
    with leave_no_trace(module):
        engine.points(network, x, None)
        real = memory.peak_bytes(lambda: engine.kernel(network, x, layers=None))
    assert 0.9 * real <= predicted <= 2 * real, f"{name}: predicted {predicted}, was {real}"


def test_plan_is_a_table_with_every_parameter() -> None:
    module, batch = build(find("transformer_encoder"), torch.float32)
    found = plan(module, batch)
    assert found.engine == "layerwise"
    assert {row.name for row in found.rows()} >= {name for name, _ in module.named_parameters()}
    assert all(row.seconds >= 0 for row in found.rows())
    assert found.chunk_size == 3
    assert "out.weight" in str(found)
    assert plan(module, batch, engine="functional").engine == "functional"


def test_a_plan_tells_seconds_on_the_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall time shrinks with threads, less than in proportion; the layerwise engine's is measured on them."""
    plans, seconds = {}, {}
    for threads in (1, 2, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        plans[threads] = plan(*NET_X, engine="functional")
        seconds[threads] = sum(row.seconds for row in plans[threads].rows() if row.name != planning.PASSES)
    assert seconds[1] / seconds[2] == pytest.approx(1.6)
    assert 2 < seconds[1] / seconds[16] < 16
    assert len({tuple((row.rule, row.flops, row.bytes) for row in found.rows()) for found in plans.values()}) == 1


def test_a_plan_counts_what_a_bias_shares_with_its_weight_once() -> None:
    """Of one position; of several, the bias has products of its own."""

    def flops(n: int, *positions: int, bias: bool) -> float:
        net = nn.Sequential(nn.Linear(300, 200, bias=bias), nn.ReLU(), nn.Linear(200, 30, bias=bias))
        rows = plan(
            net, torch.randn(n, *positions, 300), outputs=pooled if positions else None, reduction="full"
        ).rows()
        return sum(row.flops for row in rows[1:])

    assert flops(64, bias=True) == pytest.approx(flops(64, bias=False), rel=1e-3)
    assert flops(16, 4, bias=True) > 1.005 * flops(16, 4, bias=False)


def pooled(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).mean(1)


def test_slow_float64_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plan(*NET_X).notes
    monkeypatch.setattr(planning, "has_fast_double", lambda device: False)
    for engine in ("layerwise", "functional"):
        assert "float64 is slow on cpu" in str(plan(*NET_X, engine=engine)), engine
    assert not plan(*NET_X, precision="single").notes


def test_blocks_fit_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(16, 64)
    whole = empirical_ntk(net, x)
    for limit in (60_000, 20_000):
        monkeypatch.setattr("ntkwatch.engines.layerwise.limit_bytes", lambda device, limit=limit: limit)
        assert plan(net, x).chunk_size < 16, limit
        assert torch.allclose(empirical_ntk(net, x), whole, rtol=1e-6), limit


def test_running_out_of_memory_halves_the_blocks() -> None:
    sizes: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 5:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
            )
        return m.a(x)

    net = Lambda(forward, a=nn.Linear(4, 2))
    x = torch.randn(16, 4)
    assert torch.allclose(empirical_ntk(net, x), empirical_ntk(net.a, x))
    assert max(sizes) == 16
    assert 4 in sizes


@pytest.mark.parametrize(
    "name", ["mlp", "conv2d", "batch_norm", "multihead_attention", "lstm", "tied_embedding", "gru"]
)
def test_tangent(name: str) -> None:
    module, batch = build(find(name))
    j = gradients(module, batch)
    generator = torch.Generator().manual_seed(0)
    v = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        for name, p in Network(module).parameters.items()
    }
    expected = torch.stack([j[k] @ v[k].flatten() for k in v]).sum(0)
    with leave_no_trace(module):
        network = Network(module)
        f, found, how = jvp(network, batch, dict(module.named_parameters()), v)
        assert torch.allclose(f, network.outputs(batch))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), f"{name} by {how}"


def test_tangent_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = build(find("mlp"))
    v = {k: torch.ones_like(p) for k, p in Network(module).parameters.items()}
    network, state = Network(module), dict(module.named_parameters())
    reference = jvp(network, batch, state, v)
    assert reference[2] == "forward mode"

    def fails(*args: Any) -> Any:
        raise NotImplementedError("no forward mode")

    for method, how, tolerance in (("_forward", "double backward", 1e-10), ("_double_backward", "central diff", 1e-6)):
        monkeypatch.setattr(f"ntkwatch.engines.tangent.{method}", fails)
        found = jvp(network, batch, state, v)
        assert found[2].startswith(how)
        assert torch.allclose(found[1], reference[1], rtol=tolerance), how


def test_compiled_modules_add_no_graph() -> None:
    module, batch = build(find("mlp"), torch.float32)
    compiled = torch.compile(module, backend="eager")
    expected = empirical_ntk(module, batch)
    compiled(batch)
    frames = dict(torch._dynamo.utils.counters["frames"])
    assert torch.allclose(empirical_ntk(compiled, batch), expected)  # type: ignore[arg-type]
    whole = nn.Sequential(compiled, nn.Identity())  # type: ignore[arg-type]
    assert torch.allclose(empirical_ntk(whole, batch), expected)
    module.compile(backend="eager")
    assert torch.allclose(empirical_ntk(module, batch), expected)
    assert dict(torch._dynamo.utils.counters["frames"]) == frames


def test_probes_of_other_sizes_after_the_first() -> None:
    module, batch = build(find("learned_positions"))
    network, engine = Network(module), Layerwise()
    theta = naive_ntk(module, batch)
    with leave_no_trace(module):
        for rows in (slice(0, 1), slice(0, 3), slice(1, 3), slice(0, 2)):
            found = engine.kernel(network, take(batch, rows), reduction="full").value
            assert torch.allclose(found, theta[rows][:, :, rows], rtol=1e-10), rows


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nested.to_padded_tensor(self.body(torch.nested.as_nested_tensor(list(x))), 0.0).mean(1)


def test_nested_tensors_are_refused_by_the_name_of_the_module() -> None:
    model = Nested()
    with pytest.raises(UnsupportedModel, match=r"module body \(Linear\) computes on nested tensors"):
        empirical_ntk(model, torch.randn(3, 5, 4))
    assert not any(module._forward_hooks for module in model.modules())


def test_no_parameters_asked_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty list"):
        empirical_ntk(nn.Linear(3, 2), torch.randn(2, 3), params=[])

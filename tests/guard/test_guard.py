"""The guard: whatever a probe does inside, the run is bitwise what it was."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntkwatch.guard import GuardError, leave_no_trace
from ntkwatch.guard.process import _read_precision, _write_precision, guard_generators
from tests.support.operations import calls

MODULE_RNG = np.random.default_rng(7)


class Everything(nn.Module):
    """One of each thing that a forward pass may disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4, max_norm=0.5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
        self.frozen = nn.BatchNorm1d(3)
        self.frozen.eval()
        self.frozen.weight.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.normed = nn.utils.weight_norm(nn.Linear(3, 3))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("no_dims", torch.tensor(1.5, dtype=torch.float64), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("no_parameter", None)
        self.cached: Tensor | None = None
        self.ema = torch.zeros(3)
        self.seen: list[Tensor] = [torch.ones(2)]
        self.queue: deque[Tensor] = deque([torch.ones(1)], maxlen=4)
        self.counts: Counter[str] = Counter(calls=3)
        self.by_name: dict[str, Any] = {"state": {"h": torch.zeros(3)}, "list": [1, 2]}
        self.grouped: defaultdict[str, list[int]] = defaultdict(list)
        self.steps, self.names = 0, {"a"}
        self.generator = torch.Generator().manual_seed(3)
        self.random = random.Random(4)
        self.numpy, self.legacy = np.random.default_rng(5), np.random.RandomState(6)
        self.array = np.zeros(3)
        self.teacher = [nn.Sequential(nn.BatchNorm1d(3))]  # hidden from parameters()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(torch.arange(4)).sum(0) + x
        h = self.frozen(self.net(h))
        h = self.spectral(self.normed(h)) + self.teacher[0](h.detach())
        self.touch(h)
        return h

    def touch(self, h: Tensor) -> None:
        self.cached = h
        self.count += 1
        self.odd.add_(1)
        self.no_dims.mul_(2)
        self.ema.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.ema[0] = torch.rand((), generator=self.generator)
        self.seen.append(h)
        self.queue.append(h)
        self.counts["calls"] += 1
        self.by_name["state"]["h"].add_(1)
        self.by_name["list"].append(3)
        self.by_name["new"] = h
        self.grouped["k"].append(1)
        self.names.add("b")
        self.steps += 1
        self.array += self.random.random() + self.numpy.random() + self.legacy.rand() + MODULE_RNG.random()


def shrink(parameter: Tensor) -> None:
    parameter.data.sub_(0.1)


def model() -> Everything:
    torch.manual_seed(0)
    net = Everything()
    net(torch.randn(8, 4)).square().sum().backward()
    net.net[0].register_forward_hook(lambda module, args, out: None)
    net.net[4].register_full_backward_hook(lambda module, grads, outs: None)
    net.net[0].weight.register_hook(lambda grad: grad * 2)
    net.net[0].bias.register_post_accumulate_grad_hook(shrink)
    net.normed.register_forward_pre_hook(lambda module, args: None)
    return net


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes()  # .numpy() would pin the storage


def freeze(value: Any) -> Any:
    """A value that compares equal only for the very same object with the very same content."""
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return (
            id(value), value.data_ptr(), bits(value),
            None if value.is_inference() else value._version, value.requires_grad,
            None if grad is None else (id(grad), bits(grad)), freeze(value._backward_hooks),
            freeze(getattr(value, "_post_accumulate_grad_hooks", None)),
        )  # fmt: skip
    if isinstance(value, dict):
        return id(value), [(key, freeze(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque | set):
        return id(value), [freeze(item) for item in value]
    if isinstance(value, nn.Module):
        return id(value), type(value).__name__, freeze(vars(value))
    if isinstance(value, torch.Generator):
        return id(value), bits(value.get_state())
    if isinstance(value, np.random.Generator):
        return id(value), str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, np.random.RandomState):
        return id(value), str(value.get_state())
    return (id(value), value.tobytes()) if isinstance(value, np.ndarray) else (id(value), repr(value))


def flags() -> dict[str, Any]:
    """Everything global that a probe may touch, read one by one."""
    names = {
        "grad": torch.is_grad_enabled, "inference": torch.is_inference_mode_enabled,
        "autocast": lambda: [torch.is_autocast_enabled(d) for d in ("cpu", "cuda")],
        "autocast dtype": lambda: [torch.get_autocast_dtype(d) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled,
        "dtype": torch.get_default_dtype, "device": torch.get_default_device,
        "threads": torch.get_num_threads, "anomaly": torch.is_anomaly_enabled,
        "nan check": torch.is_anomaly_check_nan_enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled,
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled,
        "fast path": torch.backends.mha.get_fastpath_enabled,
        "sdp": lambda: [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
                        torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()],
        "cudnn": lambda: [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
                          torch.backends.cudnn.deterministic],
        "precision": precisions,
        "hooks": lambda: {k: list(v) for k, v in vars(nn.modules.module).items()
                          if k.startswith("_global") and isinstance(v, dict)},
        "python": random.getstate,
        "numpy": lambda: str(np.random.get_state()),  # noqa: NPY002
        "torch": lambda: bits(torch.get_rng_state()),
        "cuda seeds": lambda: len(torch.cuda._queued_calls),
    }  # fmt: skip
    return {name: read() for name, read in names.items()}


def precisions() -> list[str]:
    found = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        *(
            lambda b=b, o=o: torch._C._get_fp32_precision_getter(b, o)
            for b in ("generic", "cuda", "mkldnn")
            for o in ("all", "matmul", "conv", "rnn")
            if hasattr(torch._C, "_get_fp32_precision_getter") and (b != "generic" or o == "all")
        ),
    ):
        try:
            found.append(str(read()))
        except RuntimeError:
            found.append("raises")
    return found


def snapshot(net: nn.Module) -> dict[str, Any]:
    return {"module": freeze(net), "module rng": str(MODULE_RNG.bit_generator.state), **flags()}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what changed; of the module its deepest parts that did."""
    return [where for name in before for where in _unequal(name, before[name], after[name])]


def _unequal(where: str, a: Any, b: Any) -> Iterator[str]:
    if a == b:
        return
    if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(f"{where}.{x[0] if isinstance(x, tuple) and isinstance(x[0], str) else i}", x, y)
    else:
        yield where


def guarded(net: nn.Module, probe: Callable[[], Any], error: BaseException | None = None) -> None:
    with leave_no_trace(net):
        probe()
        if error is not None:
            raise error


# ── the naive probes ───────────────────────────────────────────────────────────────────────────────────────────────

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def train_mode_forward(net: nn.Module) -> None:
    net.train()
    net(X)


def backward(net: nn.Module) -> None:
    net(X).square().sum().backward()


def next_of_loader(net: nn.Module) -> None:
    next(iter(DataLoader(TensorDataset(X), batch_size=4, shuffle=True)))


def global_randomness(net: nn.Module) -> None:
    torch.randn(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002


def eval_train_toggle(net: nn.Module) -> None:
    net.eval()
    net(X)
    net.train()


def template_from_global_randomness(net: nn.Module) -> None:
    Everything().load_state_dict(net.state_dict())


def hook_that_returns(net: nn.Module) -> None:
    for module in net.modules():
        module.register_forward_hook(lambda module, args, out: out * 2 if isinstance(out, Tensor) else out)
    net(X)


def inference_tensors(net: nn.Module) -> None:
    with torch.inference_mode():
        net.train()
        net(X)


def deep_copy(net: nn.Module) -> None:
    twin = copy.deepcopy(net.net)
    twin(X)
    net.net = twin


def functorch_leftovers(net: nn.Module) -> None:
    parameters = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad and "net" in name}

    def f(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net.net, {k.removeprefix("net."): v for k, v in p.items()}, (x,)).sum()

    net.eval()
    net.net.register_forward_hook(lambda module, args, out: setattr(net, "cached", out))
    torch.func.grad(f)(parameters, X)
    assert torch._C._functorch.is_functorch_wrapped_tensor(net.cached), "the case is meant to leave a dead wrapper"


def precision_round_trip(net: nn.Module) -> None:
    net.half().float().double()


def reset_everything(net: nn.Module) -> None:
    net.zero_grad()
    net.requires_grad_(False)
    for module in net.modules():
        module._forward_hooks.clear()
    net.net[1].reset_running_stats()
    net.count = torch.tensor(9)
    del net.steps, net.cached, net._buffers["odd"], net._modules["frozen"]
    net.net[0].weight = nn.Parameter(torch.zeros(6, 4))
    net.__class__ = nn.Module
    net.net[4].bias.data = torch.ones(3)


def new_shapes(net: nn.Module) -> None:
    net.no_dims.data = torch.zeros(3, 3)
    net.ema.data = torch.zeros(7)
    net.odd.data = net.odd.data.half()


def optimizer_step_on_gradients(net: nn.Module) -> None:
    """A step right after `.backward()` in the guard: `.grad` is None for whatever was not touched."""
    assert all(p.grad is None for p in net.parameters()), "the run's gradients are hidden from a probe"


def global_flags(net: nn.Module) -> None:
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(max(1, torch.get_num_threads() + 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False), torch.backends.cuda.enable_math_sdp(False)
    torch.backends.mha.set_fastpath_enabled(not torch.backends.mha.get_fastpath_enabled())
    torch.set_autocast_enabled("cpu", True), torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    nn.modules.module.register_module_full_backward_hook(lambda module, grads, outs: None)


NAIVE = [
    train_mode_forward, backward, next_of_loader, global_randomness, eval_train_toggle, template_from_global_randomness,
    hook_that_returns, inference_tensors, deep_copy,
]  # fmt: skip
WORSE = [
    functorch_leftovers, precision_round_trip, reset_everything, new_shapes, optimizer_step_on_gradients, global_flags
]  # fmt: skip


@pytest.mark.parametrize("probe", NAIVE + WORSE, ids=lambda probe: probe.__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_no_trace_of(probe: Callable[[nn.Module], None], fails: bool) -> None:
    net = model()
    before = snapshot(net)

    if fails:
        with pytest.raises(OSError, match="the disk is full"):
            guarded(net, lambda: probe(net), OSError("the disk is full"))
    else:
        guarded(net, lambda: probe(net))
    after = snapshot(net)
    assert not (changed := differences(before, after)), f"{probe.__name__} left a trace in {changed}"


@pytest.mark.parametrize("probe", NAIVE, ids=lambda probe: probe.__name__)
def test_the_snapshot_can_see(probe: Callable[[nn.Module], None]) -> None:
    """Without the guard every naive probe leaves a trace: 9 of 9."""
    net = model()
    before = snapshot(net)
    probe(net)
    assert differences(before, snapshot(net)), f"{probe.__name__} was meant to leave a trace"


# ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inside_it_is_evaluation_in_full_precision() -> None:
    net = model()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True  # a flag, there without a GPU too
    saved = precisions()
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), leave_no_trace(net):
            assert not any(module.training for module in net.modules()), "a module is in training mode"
            assert not net.teacher[0][0].training, "a hidden module is in training mode"
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled(), "older torch would reuse a probe's cast in training"
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.benchmark
            out = net(X)
            assert out.dtype == torch.float32
            assert out.requires_grad
            assert not out.is_inference()
        assert precisions() == saved
        assert torch.backends.cudnn.benchmark
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False


def test_user_overrides_of_train_are_not_called() -> None:
    class Lora(nn.Linear):
        """Merges its update into the weight when it is put in evaluation mode, as LoRA layers do."""

        def train(self, mode: bool = True) -> Lora:
            raise AssertionError("train() was called")

    net = nn.Sequential(Lora(2, 2))
    with leave_no_trace(net):
        assert not net[0].training


def test_backward_listeners_do_not_hear_a_probe() -> None:
    heard: list[str] = []
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    x = X.clone().requires_grad_()
    net[0].register_full_backward_hook(lambda *_: heard.append("module"))
    net[0].register_full_backward_pre_hook(lambda *_: heard.append("module, before"))
    net[0].weight.register_hook(lambda grad: heard.append("tensor"))
    handle = net[0].weight.register_post_accumulate_grad_hook(lambda p: heard.append("accumulated"))
    anywhere = nn.modules.module.register_module_full_backward_hook(lambda *_: heard.append("everywhere"))
    with leave_no_trace(net):
        net(x).sum().backward()
        torch.autograd.grad(net(x).sum(), list(net.parameters()))
    assert heard == [], "hooks of the run heard a probe's backward"
    net(x).sum().backward()
    assert set(heard) == {"module", "module, before", "tensor", "accumulated", "everywhere"}, "hooks did not come back"
    handle.remove(), anywhere.remove()
    heard.clear()
    net(x).sum().backward()
    assert "accumulated" not in heard, "a handle lost its hook"
    assert "everywhere" not in heard, "a handle lost its hook"


def test_a_forward_that_logs_logs_nothing() -> None:
    """A LightningModule's self.log in forward, called outside a step, would raise or add to the run's metrics."""
    lightning = pytest.importorskip("pytorch_lightning")
    logged: list[str] = []

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.log("mean", x.mean())
            self.log_dict({"a": 1.0})
            return self.layer(x)

        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            logged.append(name)

    net = Net()
    net(X)
    assert logged == ["mean", "a"]
    keys = list(vars(net))
    with leave_no_trace(net):
        net(X)
    assert logged == ["mean", "a"], "a probe's forward was logged"
    assert list(vars(net)) == keys


def test_metrics_in_forward_count_no_probe() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.mean, self.cat = nn.Linear(4, 1), torchmetrics.MeanMetric(), torchmetrics.CatMetric()

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            self.mean.update(out.detach()), self.cat(out.detach())
            return out

    net = Net()
    net(X)
    mean, rows = net.mean.compute(), len(net.cat.compute())
    with leave_no_trace(net):
        net(X * 100)
        net.mean.compute()
    assert torch.equal(net.mean.compute(), mean)
    assert len(net.cat.compute()) == rows
    net(X)
    assert net.mean.weight == 16, "the metric goes on counting"


def test_a_graph_of_the_run_survives() -> None:
    """Between forward and backward: the run's graph holds a buffer that the probe writes into."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    net.eval()
    net(X).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss = net(X).square().sum()  # saves the running statistics for backward
    with leave_no_trace(net):
        net.train()
        net(X)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_training_with_probes_is_training_without() -> None:
    """Twenty steps with dropout, BatchNorm and accumulation; a guarded naive probe at every point of every step."""

    def run(probed: bool) -> list[bytes]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))
        optimizer = torch.optim.Adam(net.parameters())

        def probe() -> None:
            if probed:
                with leave_no_trace(net):
                    train_mode_forward(net)
                    net(X).sum().backward()
                    torch.manual_seed(9)

        for step in range(20):
            probe()
            loss = net(torch.randn(8, 4)).square().mean()
            probe()
            loss.backward()
            probe()
            if step % 3 == 2:
                optimizer.step()
                probe()
                optimizer.zero_grad()
        return [bits(t) for t in net.state_dict().values()] + [bits(torch.get_rng_state())]

    assert run(True) == run(False)


def test_gradients_changed_behind_torchs_back_are_not_lost() -> None:
    net = nn.Linear(4, 1)
    net(X).sum().backward()
    grad = net.weight.grad
    grad.data = grad.data.half()
    with leave_no_trace(net):
        net(X)
    assert net.weight.grad is grad


def test_cached_parametrizations_are_nobodys_business() -> None:
    """Inside torch's parametrize.cached() training reuses weights; a probe must neither get nor leave any."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    with nn.utils.parametrize.cached():
        first = net.weight
        with leave_no_trace(net):
            assert net.weight is not first, "the probe got training's cached weight"
            with nn.utils.parametrize.cached():
                net(X)
        assert net.weight is first, "training lost its cached weight"
        net(X).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_cast_made_by_a_probe_is_not_reused_by_training() -> None:
    """Autocast keeps casts of weights; one that a probe made without gradients would cut training's graph."""
    net = nn.Linear(4, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with leave_no_trace(net), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            net(X)
        net(X).sum().backward()
    assert net.weight.grad is not None


def test_state_kept_in_plain_objects_and_very_long_lists() -> None:
    @dataclass
    class State:
        h: Tensor
        calls: int = 0

    net = nn.Linear(4, 1)
    net.state, net.space = State(torch.zeros(2)), SimpleNamespace(h=torch.zeros(2), seen=[1])
    net.losses, net.vocabulary = [0.1] * 200_000, {i: i for i in range(200_000)}
    with leave_no_trace(net):
        net.state.h.add_(1), net.space.h.add_(1), net.space.seen.append(2)
        net.state.calls, net.state.h = 5, torch.ones(3)
        net.losses += [1.0, 2.0]
        net.vocabulary["new"] = 1
    assert net.state == State(net.state.h, 0)
    assert net.state.h.tolist() == net.space.h.tolist() == [0, 0]
    assert net.space.seen == [1]
    assert len(net.losses) == len(net.vocabulary) == 200_000
    with pytest.raises(GuardError, match="took 1 of 200000 items out of a list"):
        guarded(net, net.losses.pop)


def test_parameters_as_keys() -> None:
    """Dicts keyed by parameters, as optimizers keep them, are compared without comparing tensors."""
    net = nn.Linear(4, 2)
    net.masks = {parameter: torch.ones_like(parameter) for parameter in net.parameters()}
    before = list(net.masks.items())
    with leave_no_trace(net):
        net.masks[net.weight] = torch.zeros(1)
        net.masks[torch.ones(3)] = 1
    assert [(id(k), id(v)) for k, v in net.masks.items()] == [(id(k), id(v)) for k, v in before]


def test_what_forward_computes_once_is_computed_again() -> None:
    """A cached property filled by a probe would hold the probe's tensors."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        @functools.cached_property
        def mask(self) -> Tensor:
            return self.weight.detach() > 0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask

    net = Net()
    with leave_no_trace(net):
        net(X)
    assert "mask" not in vars(net)


def test_observers_of_quantization_see_no_probe() -> None:
    """They resize their buffers in place, in evaluation mode too."""
    observer = torch.ao.quantization.PerChannelMinMaxObserver()
    net = nn.ModuleList([observer, torch.ao.quantization.MovingAverageMinMaxObserver()])
    before = {name: (t.shape, bits(t)) for name, t in net.state_dict().items()}
    with leave_no_trace(net):
        net[0](X), net[1](X)
        assert observer.min_val.numel() == 8, "the case is meant to resize"
    assert {name: (t.shape, bits(t)) for name, t in net.state_dict().items()} == before


# ── what cannot be undone, and what must not be touched ─────────────────────────────────────────────────────────────


def test_a_changed_parameter_is_named() -> None:
    net = model()
    before = snapshot(net)

    def probe() -> None:
        net(X)
        net.net[4].weight.data.add_(0), net.net[4].weight.detach().add_(1)

    with pytest.raises(GuardError, match=r"net\.4\.weight") as caught:
        guarded(net, probe)
    assert "embed.weight" not in str(caught.value), "max_norm changed the embedding, which is put back"
    changed = differences(before, snapshot(net))
    assert all(".net." in where and ".4." in where and "weight" in where for where in changed), f"also {changed}"


def test_a_failing_probe_that_changed_a_parameter_says_both() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(GuardError, match="weight") as caught:
        guarded(net, lambda: net.weight.detach().add_(1), OSError("the disk is full"))
    assert isinstance(caught.value.__cause__, OSError)


def test_an_embedding_with_max_norm_is_put_back() -> None:
    net = nn.Embedding(10, 4, max_norm=0.1)
    before = bits(net.weight)
    with leave_no_trace(net):
        net(torch.arange(10))
        assert bits(net.weight) != before, "the case is meant to renormalise"
    assert bits(net.weight) == before


def test_tensors_too_large_to_copy_are_watched() -> None:
    net = nn.Linear(2, 2)
    net.everything = [torch.zeros(3 << 20), torch.zeros(3 << 20)]  # 24 MiB in a list
    with leave_no_trace(net):
        net.everything[0].add_(1)
    assert float(net.everything[0][0]) == 0.0, "the first still fits and is copied"
    with pytest.raises(GuardError, match="in a list or dict"), leave_no_trace(net):
        net.everything[1].add_(1)


def test_a_lazy_module_is_refused_before_anything_is_touched() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(GuardError, match="run the model on one batch"), leave_no_trace(net):
        pass
    assert net.training
    assert nn.parameter.is_lazy(net[1].weight)


def test_scripted_modules_keep_their_mode_and_buffers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net = nn.Sequential(inner, nn.Linear(4, 1))
    net(X)
    before = {name: bits(t) for name, t in net.state_dict().items()}
    with leave_no_trace(net):
        assert not any(module.training for module in net.modules())
        net.train()
        net(X)
    assert {name: bits(t) for name, t in net.state_dict().items()} == before
    assert all(module.training for module in net.modules())


def test_odd_tensors_do_not_stop_it() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("meta", torch.ones(3, device="meta"))
            self.register_buffer("expanded", torch.ones(1).expand(5))
            self.register_buffer("strided", torch.arange(12.0).reshape(3, 4).t())
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
            self.register_buffer("flags", torch.tensor([True, False]))
            self.register_buffer("bfloat", torch.ones(3, dtype=torch.bfloat16))
            with torch.inference_mode():
                self.register_buffer("inference", torch.ones(3))
            self.shared = self.strided[1]
            self.itself = self
            self.loop: list[Any] = []
            self.loop.append(self.loop)

    net = Odd()
    names = ("strided", "complex", "flags", "bfloat", "inference", "shared")
    before = {name: bits(getattr(net, name)) for name in names}
    with leave_no_trace(net):
        net.strided.add_(1), net.complex.mul_(2), net.flags.logical_not_(), net.bfloat.add_(1)
        with torch.inference_mode():
            net.inference.add_(1)
    assert {name: bits(getattr(net, name)) for name in names} == before


def test_a_module_twice_and_shared_between_roots() -> None:
    shared = nn.BatchNorm1d(4)
    a, b = nn.Sequential(shared, shared), nn.Sequential(shared)
    before = bits(shared.running_mean)
    with leave_no_trace(a, b, a):
        shared.train()
        a(X), b(X)
    assert bits(shared.running_mean) == before
    assert shared.training


def test_nested_guards() -> None:
    net = model()
    before = snapshot(net)
    with leave_no_trace(net):
        train_mode_forward(net)
        inside = snapshot(net)
        with pytest.raises(OSError, match="inner"):
            guarded(net, lambda: backward(net), OSError("inner"))
        assert not differences(inside, snapshot(net)), "the inner guard left a trace in the outer one"
        global_flags(net)
    assert not differences(before, snapshot(net))


def test_no_modules_guard_the_process_alone() -> None:
    before = flags()
    with leave_no_trace():
        global_randomness(nn.Module())
    assert flags() == before


# ── precision flags, old and new ───────────────────────────────────────────────────────────────────────────────────

PRECISION_SETTINGS = {
    "untouched": "pass",
    "matmul high": "torch.set_float32_matmul_precision('high')",
    "old matmul flag": "torch.backends.cuda.matmul.allow_tf32 = True",
    "old cudnn flag": "torch.backends.cudnn.allow_tf32 = False",
    "new matmul flag": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "new generic flag": "torch.backends.fp32_precision = 'tf32'",
    "new generic flag, one exempt": "torch.backends.fp32_precision = 'tf32'; "
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "new cudnn conv flag": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "mkldnn": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "old and new": "torch.set_float32_matmul_precision('high'); torch.backends.cudnn.rnn.fp32_precision = 'ieee'",
}


@pytest.fixture
def _precision() -> Iterator[None]:
    saved = _read_precision()
    yield
    _write_precision(saved)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("name", PRECISION_SETTINGS)
def test_precision_flags_come_back_however_they_were_set(name: str) -> None:
    if "fp32_precision" in PRECISION_SETTINGS[name] and not hasattr(torch._C, "_get_fp32_precision_getter"):
        pytest.skip("this torch has the old flags only")
    exec(PRECISION_SETTINGS[name])
    before = precisions()
    with leave_no_trace(nn.Linear(2, 2)):
        assert torch.get_float32_matmul_precision() == "highest", name
        assert set(precisions()) <= {"highest", "False", "ieee"}, f"{name}: reduced precision inside: {precisions()}"
        torch.backends.cudnn.allow_tf32 = True
    assert precisions() == before, name


@pytest.mark.usefixtures("_precision")
@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch < 2.9")
def test_an_unset_precision_flag_still_follows_its_parent() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    with leave_no_trace():
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert torch.backends.cuda.matmul.fp32_precision == "ieee", "the guard turned an inherited value into a set one"


# ── signals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupt_in_the_body_passes_through() -> None:
    net = model()
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        guarded(net, lambda: train_mode_forward(net), KeyboardInterrupt())
    assert not differences(before, snapshot(net))


def test_an_interrupt_is_not_replaced_by_a_guard_error() -> None:
    net = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="weight"), pytest.raises(SystemExit):
        guarded(net, lambda: net.weight.detach().add_(1), SystemExit())


# ── compiled modules ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_compiled_model_makes_no_new_graph() -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Net(nn.Module):  # dynamo skips the frames of torch.nn's own containers
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    in_place = Net()
    in_place.compile(backend=backend)
    wrapped = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend=backend)
    for _ in range(2):
        wrapped(X), in_place(X)
    made = len(graphs)
    assert made >= 2, "the case is meant to compile"
    counters.clear()
    called = in_place._compiled_call_impl
    for _ in range(3):
        with leave_no_trace(in_place, wrapped):
            assert in_place._compiled_call_impl is None
            wrapped(X[:5]), in_place(X[:3])
        wrapped(X), in_place(X)
    assert in_place._compiled_call_impl is called
    assert len(graphs) == made, f"{len(graphs) - made} new graphs"
    assert not counters["recompile_limit"]
    torch._dynamo.reset()


# ── sharded modules ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _one_rank(folder: Any) -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_fsdp_keeps_what_it_manages(tmp_path: Any) -> None:
    """FSDP swaps parameters and registers hooks in its first forward, which may be the probe's; training goes on."""
    from torch.distributed.fsdp import fully_shard

    def run(mesh: Any, probed: bool) -> list[bytes]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1))
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            if probed:
                with leave_no_trace(net):
                    assert not net.training
                    net(X)
            net(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert net.training
        state = net.state_dict()
        return [bits(t.full_tensor() if hasattr(t, "full_tensor") else t) for t in state.values()]

    with _one_rank(tmp_path) as mesh:
        assert run(mesh, True) == run(mesh, False)


def test_the_older_fsdp_keeps_its_attributes() -> None:
    """It writes its state into the attributes of modules; of these only the mode is touched and put back."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.state, self.handles = module, "idle", [1]

        def forward(self, x: Tensor) -> Tensor:
            self.state, self.started = "ready", True
            self.handles.append(2)
            return self.module(x)

    net = FullyShardedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    net.module[1].eval()
    net._compiled_call_impl = compiled = net._call_impl
    before = bits(net.module[1].running_mean)
    with leave_no_trace(net):
        assert not net.training
        net.module[1].train()
        net(X)
    assert (net.state, net.started, net.handles) == ("ready", True, [1, 2])
    assert net.training
    assert not net.module[1].training
    assert net._compiled_call_impl == compiled
    assert bits(net.module[1].running_mean) == before


# ── cost ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_guarding_is_cheap_and_no_dearer_for_each_of_many_modules() -> None:
    """In calls of functions, of which a module takes about a hundred."""
    cost = {n: calls_of_a_guard(n) for n in (250, 500)}
    each = (cost[500] - cost[250]) / (4 * 250)
    assert each < 200, f"{each:.0f} calls for each module"
    assert cost[500] < 2.2 * cost[250], f"more than in proportion: {cost}"


def calls_of_a_guard(n: int) -> int:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(n)))
    net(torch.randn(4, 8)).sum().backward()
    guarded(net, lambda: None)  # what is done once
    return calls(lambda: guarded(net, lambda: None))


def test_nothing_leaks() -> None:
    net = model()

    for _ in range(2):  # counting makes some objects of its own, once
        guarded(net, lambda: net(X))
        kinds = Counter(type(thing).__name__ for thing in _living())
    for _ in range(40):
        guarded(net, lambda: net(X))
    grown = Counter(type(thing).__name__ for thing in _living()) - kinds
    assert not {kind: count for kind, count in grown.items() if count >= 40}, f"objects pile up: {grown}"


def _living() -> list[object]:
    import gc

    gc.collect()
    return gc.get_objects()


def test_ordered_dicts_keep_their_order() -> None:
    net = nn.Linear(2, 2)
    net.table = OrderedDict(a=1, b=2, c=3)
    with leave_no_trace(net):
        net.table.move_to_end("a")
        del net.table["b"]
    assert list(net.table) == ["a", "b", "c"]


def test_a_generator_is_put_back_where_it_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out in the comparison itself."""

    def equal(a: Tensor, b: Tensor) -> bool:
        raise MemoryError("no memory to compare")

    net, before = nn.Linear(2, 2), torch.get_rng_state().numpy().copy()
    with leave_no_trace(net):
        torch.rand(3)
        undo: list[Any] = []
        guard_generators(undo)
        inside = torch.get_rng_state().numpy().copy()
        torch.rand(3)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "equal", equal)
            for put in reversed(undo):
                put()
        assert np.array_equal(torch.get_rng_state().numpy(), inside)
    assert np.array_equal(torch.get_rng_state().numpy(), before)


def test_a_generator_that_did_not_move_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's must not be: cuDNN draws its dropout anew once it has been, even to the state that it was in."""
    given: list[torch.Tensor] = []
    put, net = torch.set_rng_state, nn.Linear(2, 2)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: (given.append(state), put(state)))
    before = torch.get_rng_state()
    with leave_no_trace(net):
        pass
    assert not given
    with leave_no_trace(net):
        torch.rand(3)
    assert len(given) == 1
    assert torch.equal(torch.get_rng_state(), before)

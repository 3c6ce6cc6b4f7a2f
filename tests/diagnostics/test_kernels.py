"""The kernels of sign descent and of softmax as diagnostics: against naive loops, their laws, their reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch import Monitor, NTKWatch, engines, load_run, metrics
from ntkwatch.diagnostics import DIAGNOSTICS
from ntkwatch.diagnostics.signs import SIGN_DESCENT
from ntkwatch.diagnostics.softmax import SOFTMAX
from ntkwatch.engines.layerwise import Layerwise
from tests.support.oracles import gradients
from tests.support.runs import Classifier, loaders, trainer, whole_and_resumed

BOTH = [*SIGN_DESCENT, *SOFTMAX]


def net(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def rows(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 3
    return torch.randn(n, 4, generator=generator).double() + nn.functional.one_hot(y, 4), y


def train(model: nn.Module, batch: Any, steps: int = 20) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def naive(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K_sign [n, n], K [n, n] and PΘP [n, C, n, C], entry by entry."""
    j = torch.cat(list(gradients(model, x).values()), 2)
    c = j.shape[1]
    project = torch.eye(c).double() - 1 / c
    theta = torch.einsum("ncp,mdp->ncmd", j, j)
    signed = sum(j[:, i] @ j[:, i].sign().T for i in range(c)) / c
    plain = sum(theta[:, i, :, i] for i in range(c)) / c
    return signed, plain, torch.einsum("ab,nbmd,de->name", project, theta, project)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def centred(k: Tensor) -> Tensor:
    c = torch.eye(len(k)).double() - 1 / len(k)
    return c @ k @ c


@pytest.mark.parametrize("reduction", ["trace", "sum", "blocks", "full"])
def test_they_are_the_formulas_along_a_run(reduction: str) -> None:
    model, (x, y) = net(), rows()
    monitor = Monitor(model, (x, y), diagnostics=BOTH, reduction=reduction)
    first = monitor.measure(0).metrics
    signed_0, _, softmax_0 = naive(model, x)
    train(model, (x, y))
    found = monitor.measure(20)
    signed, plain, softmax = naive(model, x)
    target = centred(nn.functional.one_hot(y).double() @ nn.functional.one_hot(y).double().T)
    blocks = sum(softmax[:, c, :, c] for c in range(3)) / 3
    wanted = {
        "sign_angle": math.acos(cosine(signed, signed_0)),
        "sign_asymmetry": (signed - signed.T).norm() / signed.norm(),
        "sign_alignment": cosine(centred(signed + signed.T), target),
        "sign_cosine": cosine(signed, plain),
        "softmax_centred_angle": math.acos(cosine(softmax, softmax_0)),
        "softmax_centred_share": torch.einsum("ncnc->", softmax) / (3 * plain.trace()),
        "softmax_centred_alignment": cosine(centred(blocks), target),
    }
    assert set(wanted) == set(BOTH)
    for name, value in wanted.items():
        assert found.metrics[name] == pytest.approx(float(value), rel=1e-8), f"{reduction}: {name}"
    assert first["sign_angle"] == first["softmax_centred_angle"] == 0
    assert found.metrics["sign_angle"] > 0.01 < found.metrics["sign_asymmetry"], "there is something to see"


def test_a_later_probe_computes_nothing_at_the_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel of signs a probe, the baseline's own kept."""
    asked: list[bool] = []
    kernel = Layerwise.kernel

    def counting(self: Layerwise, *args: Any, **settings: Any) -> Any:
        asked.append(settings.get("signed", False))
        return kernel(self, *args, **settings)

    monitor = Monitor(net(), rows(), diagnostics=BOTH)
    monitor.start()
    monkeypatch.setattr(Layerwise, "kernel", counting)
    for step in range(3):
        asked.clear()
        monitor.measure(step)
        assert asked == [False, True], f"step {step}"


def test_fresh_probes_are_compared_at_the_start_on_themselves() -> None:
    from ntkwatch.probes import ProbeSet

    model, (x, y) = net(), rows()
    monitor = Monitor(model, (x, y), diagnostics=BOTH)
    monitor.measure(0)
    fresh = ProbeSet.of((x.flip(0) + 0.5, y.flip(0)), None)
    signed_0, _, softmax_0 = naive(model, x.flip(0) + 0.5)
    train(model, (x, y))
    found = monitor.measure(20, probes=fresh).metrics
    signed, _, softmax = naive(model, x.flip(0) + 0.5)
    assert found["sign_angle"] == pytest.approx(float(metrics.kernel_angle(signed, signed_0)), rel=1e-8)
    assert found["softmax_centred_angle"] == pytest.approx(float(metrics.kernel_angle(softmax, softmax_0)), rel=1e-8)
    own = monitor.measure(21).metrics["sign_angle"]
    signed, signed_0 = naive(model, x)[0], naive(net(), x)[0]
    assert own == pytest.approx(float(metrics.kernel_angle(signed, signed_0)), rel=1e-8), "and the first ones on theirs"


class Shifted(nn.Module):
    """f_c(x) + g(x) for every c: `own` gives g parameters of its own."""

    def __init__(self, f: nn.Module, g: nn.Module, own: bool) -> None:
        super().__init__()
        self.f, self.g = f, g.requires_grad_(own)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) + self.g(x)


class Leaning(nn.Module):
    """A shift of all outputs by a function of the parameters that the outputs are made of."""

    def __init__(self, f: nn.Sequential) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        return out + self.f[:2](x).square().sum(1, keepdim=True) + out[:, :1].sin()


SHIFTS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "with parameters of its own": lambda f: Shifted(f, net(1, seed=5), own=True),
    "frozen": lambda f: Shifted(f, net(1, seed=5), own=False),
    "of the same parameters": Leaning,
}


@pytest.mark.parametrize("case", SHIFTS)
def test_a_function_that_all_outputs_share_is_not_seen(case: str) -> None:
    """The law of PΘP on real networks; the plain kernel is no such thing, unless the shift has no parameters."""
    x, y = rows()
    model, other = net(), SHIFTS[case](net())
    one, two = (engines.empirical_ntk(m, x, reduction="full") for m in (model, other))
    torch.testing.assert_close(metrics.softmax_centred(one), metrics.softmax_centred(two), rtol=1e-9, atol=1e-9)
    assert torch.allclose(one, two) is (case == "frozen"), "negative control"
    found = [Monitor(m, (x, y), diagnostics=["softmax_centred_alignment"]).measure(0).metrics for m in (model, other)]
    assert found[0]["softmax_centred_alignment"] == pytest.approx(found[1]["softmax_centred_alignment"], rel=1e-8)


def test_cross_entropy_descends_through_the_centred_kernel_alone() -> None:
    """Θ∇𝓛 and PΘP∇𝓛 move the probabilities by the same, to first order; for squared loss they do not."""
    model, (x, y) = net(), rows()
    theta = engines.empirical_ntk(model, x, reduction="full")
    f = model(x).detach().requires_grad_()
    gradient = torch.autograd.grad(nn.functional.cross_entropy(f, y), f)[0]
    moves = [torch.einsum("ncmd,md->nc", k, gradient) for k in (theta, metrics.softmax_centred(theta))]
    p = f.detach().softmax(1)
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    seen = [torch.einsum("ncd,nd->nc", jacobian, move) for move in moves]
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(moves[0], moves[1])


class Alike(nn.Module):
    """Three logits that are one function: nothing that softmax could see."""

    def __init__(self) -> None:
        super().__init__()
        self.f = net(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x).expand(-1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_softmax_sees_nothing_it_says_so(dtype: torch.dtype) -> None:
    x, y = rows()
    one = Monitor(net(1).to(dtype), (x.to(dtype), y.to(dtype)), diagnostics=list(SOFTMAX)).measure(0)
    alike = Monitor(Alike().to(dtype), (x.to(dtype), y), diagnostics=list(SOFTMAX)).measure(0)
    for name in SOFTMAX:
        assert "one output" in one.reasons[name], name
        if name != "softmax_centred_share":
            assert "a shift that they share" in alike.reasons[name], name
    assert alike.metrics["softmax_centred_share"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", BOTH)
def test_what_they_need_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch.measurement import arguments as checks

    x, y = rows()
    if "targets" in DIAGNOSTICS[name].needs:
        assert "targets" in Monitor(net(), x, diagnostics=[name]).measure(0).reasons[name]
    monkeypatch.setattr(checks, "FULL_LIMIT", 1)
    found = Monitor(net(), (x, y), diagnostics=[name]).measure(0)
    assert ("full kernel of 12 probes x 3 outputs" in found.reasons.get(name, "")) is (name in SOFTMAX)


def test_training_is_bitwise_what_it_is_without_them(tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Classifier(norm=True)
        model.net.insert(2, nn.Dropout(0.2))
        watch = NTKWatch(probes=12, budget=None, every=2, diagnostics=[*BOTH, "gp_nll"], on_error="raise")
        trainer(tmp_path, *[watch] * watched).fit(model, *loaders())
        ends.append((model.state_dict(), torch.get_rng_state()))
    assert watch.last.metrics["sign_angle"] > 0
    assert torch.equal(ends[0][1], ends[1][1]), "random state"
    for name, value in ends[0][0].items():
        assert torch.equal(value, ends[1][0][name]), name


def test_through_the_callback_and_over_a_resume(tmp_path: Path) -> None:
    settings = {"probes": 12, "budget": None, "every": [0, 6, 12], "diagnostics": BOTH, "on_error": "raise"}
    whole, watch = whole_and_resumed(tmp_path, **settings)
    resumed, expected = load_run(watch.record).metrics, load_run(whole.record).metrics
    for name in BOTH:
        assert expected[name].notna().all(), name
        assert resumed[name].loc[:6].tolist() == expected[name].loc[:6].tolist(), name
    assert resumed["sign_angle"].loc[12] > resumed["sign_angle"].loc[6] > 0, "against θ_0, kernels made anew"

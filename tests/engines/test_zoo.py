"""Both engines against the naive double loop, on every case of the zoo and with every reduction, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ntkwatch.engines import (
    UnsupportedModel,
    capture,
    chunked_matmul,
    contract,
    early_jacobians,
    empirical_ntk,
    machines,
)
from ntkwatch.engines.layerwise import Layerwise
from ntkwatch.guard import leave_no_trace
from ntkwatch.model import Network, take
from tests.support import cases_adversarial, cases_attacks, cases_constructions, cases_hf, cases_hf_more, cases_routing
from tests.support.cases import CASES, Case, build
from tests.support.device import DEVICE, placed
from tests.support.oracles import naive_layers, naive_ntk, reduced

assert cases_adversarial
assert cases_attacks
assert cases_constructions
assert cases_hf
assert cases_routing
REDUCTIONS = ("trace", "blocks", "full", "sum")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def params(refused: bool) -> list[Any]:
    return [
        pytest.param(c, id=c.name, marks=[pytest.mark.soak] if c.heavy else [])
        for c in CASES
        if bool(c.refused) == refused
    ]


@pytest.mark.parametrize("case", params(refused=False))
def test_layerwise_equals_the_naive_loop(case: Case) -> None:
    module, batch = build(case)
    layers = naive_layers(module, batch)
    theta = torch.stack(list(layers.values())).sum(0)
    assert theta.shape[1] == case.outputs, f"{case}: C"
    for reduction in REDUCTIONS:
        limit = 1e-7 if reduction == "sum" and case.float32_inside else 1e-10
        with leave_no_trace(module):  # the rules themselves: a choice of engines would take what is right without them
            found = Layerwise().kernel(Network(module), batch, reduction=reduction, layers=reduction).layers  # type: ignore[arg-type]
        assert set(found) == set(layers), f"{case}: names of layers"
        total = torch.stack(list(found.values())).sum(0)
        assert error(total, reduced(theta, reduction)) < limit, f"{case}: {reduction}"
        scale = reduced(theta, reduction).abs().max()
        for name, own in layers.items():
            off = (found[name] - reduced(own, reduction)).abs().max() / scale
            assert off < limit, f"{case}: {reduction} of {name} is off by {off:.1e}"


@pytest.mark.parametrize("case", params(refused=False))
def test_rectangular_and_chunked(case: Case) -> None:
    module, batch = build(case)
    theta = naive_ntk(module, batch)
    other = take(batch, slice(0, 2))
    if case.name.startswith("hf_"):
        found = empirical_ntk(module, batch, other, engine="layerwise", chunk_size=2)
        assert error(found, reduced(theta[:, :, :2], "trace")) < 1e-10, f"{case}: trace with x2"
        return
    for reduction in ("trace", "full"):
        found = empirical_ntk(module, batch, other, reduction=reduction, engine="layerwise", chunk_size=2)
        assert error(found, reduced(theta[:, :, :2], reduction)) < 1e-10, f"{case}: {reduction} with x2"
    assert error(empirical_ntk(module, batch, chunk_size=2), reduced(theta, "trace")) < 1e-10, f"{case}: in chunks"


@pytest.mark.parametrize("case", params(refused=False))
def test_functional_equals_the_naive_loop_or_refuses(case: Case) -> None:
    module, batch = build(case)
    if not case.functional and DEVICE.type == "cpu":
        with pytest.raises(UnsupportedModel, match=r"torch\.func"):
            empirical_ntk(module, batch, engine="functional")
        return
    theta = naive_ntk(module, batch)
    for reduction in REDUCTIONS:
        limit = 1e-7 if reduction == "sum" and case.float32_inside else 1e-10
        try:
            found = empirical_ntk(module, batch, reduction=reduction, engine="functional")
        except UnsupportedModel as refusal:
            if DEVICE.type == "cpu":
                raise
            pytest.skip(f"{case} on {DEVICE}: {refusal}")  # TorchScript refuses other things on a GPU
        assert error(found, reduced(theta, reduction)) < limit, f"{case}: {reduction}"


@pytest.mark.parametrize("case", params(refused=True))
def test_refused_by_name(case: Case) -> None:
    module, batch = build(case)
    with pytest.raises(UnsupportedModel, match=case.refused):
        empirical_ntk(module, batch)


def test_the_zoo_is_large_enough() -> None:
    assert len(CASES) >= 60, f"{len(CASES)} cases"
    assert sum(c.name.startswith("hf_") for c in CASES) >= 26
    refused = [c for c in CASES if c.refused]
    assert 20 * len(refused) <= len(CASES), "three of sixty"
    coupled = ("other examples", "BatchNorm1d")  # of which there is no per-example kernel
    assert sum(c.refused not in coupled for c in refused) <= 1, [c.name for c in refused]


def test_segments_and_groups_of_outputs_and_batches_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(capture, "GROUP_BYTES", 1)
    monkeypatch.setattr(capture, "_PASS_BYTES", {})
    for case in [c for c in CASES if not c.refused and not c.name.startswith("hf_")]:
        module, batch = build(case)
        theta = naive_ntk(module, batch)
        network, engine = Network(module), Layerwise()
        for reduction in ("blocks", "full"):
            found = engine.kernel(network, batch, reduction=reduction, layers=None).value
            assert error(found, reduced(theta, reduction)) < 1e-10, f"{case}: {reduction}, in segments and groups"


def test_passes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gradients come in one batch; large ones do not, and theirs are kept apart."""
    monkeypatch.setattr(capture, "_BATCHED_BYTES", {})
    for case in [c for c in CASES if not c.refused]:
        module, batch = build(case)
        found = Layerwise().kernel(Network(module), batch, reduction="full", layers=None).value
        off = error(found, reduced(naive_ntk(module, batch), "full"))
        assert off < (1e-7 if case.float32_inside else 1e-10), f"{case}: in turn, {off:.1e}"


@pytest.mark.parametrize("segment", [1, 1 << 25], ids=["in segments", "whole"])
def test_jacobians_written_out_pass_by_pass(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of early convolutions are: here of every layer of every model."""
    monkeypatch.setattr(capture, "_BATCHED_BYTES", {})
    monkeypatch.setattr(capture, "SEGMENT_BYTES", segment)
    monkeypatch.setattr(early_jacobians, "_LARGE", 0)
    monkeypatch.setattr(early_jacobians, "_MUCH", 0)
    monkeypatch.setattr(early_jacobians, "_WIDE", 1e9)
    for case in [c for c in CASES if not c.refused]:
        module, batch = build(case)
        found = Layerwise().kernel(Network(module), batch, reduction="full", layers=None).value
        off = error(found, reduced(naive_ntk(module, batch), "full"))
        assert off < (1e-7 if case.float32_inside else 1e-10), f"{case}: written out, {off:.1e}"


def test_the_portions_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for a GPU is as right, so that a machine without one sees it too."""
    monkeypatch.setitem(machines.MACHINES, "cpu", machines.MACHINES["cuda"])
    monkeypatch.setattr(contract, "CHUNK", 8)
    monkeypatch.setattr(chunked_matmul, "CHUNK", 8)
    for case in [c for c in CASES if not c.refused and not c.name.startswith("hf_")]:
        for dtype, limit in ((torch.float64, 1e-7 if case.float32_inside else 1e-10), (torch.float32, 1e-4)):
            module, batch = build(case, dtype)
            theta = naive_ntk(*build(case))
            for reduction in REDUCTIONS if dtype == torch.float64 else ("trace",):
                found = Layerwise().kernel(Network(module), batch, reduction=reduction, precision="single", layers=None)
                assert error(found.value, reduced(theta, reduction).to(dtype)) < limit, f"{case}: {reduction}, {dtype}"


FEW = ("Gemma3Text",)  # whose norms are taken in float32: the self-check has to let that pass


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.soak] * (n not in FEW)) for n in cases_hf_more.NAMES]
)
def test_more_architectures(name: str) -> None:
    torch.manual_seed(0)
    module, batch = cases_hf_more.build_more(name)
    double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    module, batch = placed(module.double().eval(), double)
    theta = naive_ntk(module, batch)
    for reduction in ("trace", "full"):
        assert error(empirical_ntk(module, batch, reduction=reduction), reduced(theta, reduction)) < 1e-10, name

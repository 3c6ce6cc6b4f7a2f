"""C2, C10, C11, C13: claims of a few seconds each."""

from __future__ import annotations

import math

import torch

from ntkwatch import empirical_ntk, infinite, metrics
from tests.claims.networks import Net, descend, digits, slope
from tests.claims.table import Row, between


def analytic(quick: bool) -> list[Row]:
    """C2: ‖K_0 − K_∞‖/‖K_∞‖ falls as n^−½."""
    x, _ = digits(12)
    spec = infinite.Serial(
        infinite.Dense(math.sqrt(2)),
        infinite.Relu(),
        infinite.Dense(math.sqrt(2)),
        infinite.Relu(),
        infinite.Dense(1.0),
    )
    limit = infinite.kernel(spec, x.double()).ntk
    widths, seeds = ((32, 128, 512), 6) if quick else ((32, 64, 128, 256, 512, 1024), 20)
    points = []
    for n in widths:
        for seed in range(seeds):
            k = empirical_ntk(Net((64, n, n, 1), seed), x, engine="layerwise")
            points.append((n, float((k - limit).norm() / limit.norm())))
    band = (-0.65, -0.35) if quick else (-0.57, -0.43)
    return [between("C2", "slope of ‖K₀ − K∞‖/‖K∞‖ in width", slope(points), *band)]


def pseudo(quick: bool) -> list[Row]:
    """C13: the sum (pseudo-NTK) and the trace kernel meet at initialisation as n^−½."""
    x, _ = digits(12)
    widths, seeds = ((32, 128, 512), 3) if quick else ((32, 64, 128, 256, 512, 1024), 5)
    points = []
    for n in widths:
        for seed in range(seeds):
            net = Net((64, n, n, 5), seed)
            k, s = (empirical_ntk(net, x, reduction=r, engine="layerwise") for r in ("trace", "sum"))
            points.append((n, float((s - k).norm() / k.norm())))
    return [between("C13", "slope of ‖K_sum − K‖/‖K‖ in width, C = 5", slope(points), -0.6, -0.4)]


def silent(quick: bool) -> list[Row]:
    """C10: a two-layer linear network on whitened inputs aligns before its loss falls, from a small start only."""
    d, hidden = 10, 60
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(d, d, generator=generator))[0] * math.sqrt(d)
    y = x @ torch.randn(d, 1, generator=generator) / math.sqrt(d)
    y = y / y.norm() * math.sqrt(d)
    rows = []
    for std, text, low, high in ((1e-3, "small init", 0.98, 1.001), (1.0, "σ = 1", -1.0, 0.5)):
        net = Net((d, hidden, 1), 0, std=std, activation=lambda h: h, gain=1.0)
        start = _alignment(net, x, y)
        losses = descend(net, x, y, lr=0.3, steps=1)
        while losses[-1] > 0.9 * losses[0]:
            losses += descend(net, x, y, lr=0.3, steps=1)
        at = _alignment(net, x, y)
        descend(net, x, y, lr=0.3, steps=200)
        progress = (at - start) / (_alignment(net, x, y) - start)
        rows.append(between("C10", f"alignment progress at a 10 % drop of the loss, {text}", progress, low, high))
    return rows


def _alignment(net: Net, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(metrics.target_alignment(empirical_ntk(net, x, engine="layerwise"), y))


def catapult(quick: bool) -> list[Row]:
    """C11: a two-layer linear network below 2/λ_0, between 2 and 4, and above 4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator)
    y = torch.randn(20, 1, generator=generator)
    rows = []
    for c, what in ((1.5, "stable"), (3.0, "catapult"), (5.0, "diverges")):
        net = Net((16, 512, 1), 1, activation=lambda h: h, gain=1.0)
        rate = float(metrics.eigenvalues(empirical_ntk(net, x, engine="layerwise"))[0]) / len(x)
        losses = descend(net, x, y, c / rate, 100 if quick else 400)
        end = losses[-1] if math.isfinite(losses[-1]) else math.inf
        if what == "diverges":
            rows.append(between("C11", "η = 5/λ₀: the loss diverges, log₁₀ 𝓛", math.log10(min(end, 1e30)), 7, 31))
            continue
        curvature = float(metrics.eigenvalues(empirical_ntk(net, x, engine="layerwise"))[0]) / len(x)
        peak = max(losses) / losses[0]
        band = (1.0, 1.001) if what == "stable" else (2.0, math.inf)
        rows.append(between("C11", f"η = {c}/λ₀: {what}, highest loss over the first", peak, *band))
        rows.append(between("C11", f"η = {c}/λ₀: ηλ at the end", c / rate * curvature, 0, 2))
        rows.append(between("C11", f"η = {c}/λ₀: last loss over the first", end / losses[0], 0, 0.9))
    return rows

"""C1 and C3 over width, C7 and C8 along a run: on real digits."""

from __future__ import annotations

import math

import torch
from torch import nn

from ntkwatch import Monitor
from tests.claims.networks import Net, descend, digits, slope
from tests.claims.table import Row, between

LAZY = (-1.2, -0.7)


def width(quick: bool) -> list[Row]:
    """C1: kernel change falls as 1/n in the NTK and standard parametrizations, not in muP; C3: so does the error."""
    x, label = digits(128)
    y = (label % 2 * 2.0 - 1)[:, None]
    widths, seeds = ((32, 64, 128, 256), (1, 2)) if quick else ((32, 64, 128, 256, 512, 1024), (1, 2, 3))
    change: dict[str, list[tuple[float, float]]] = {"NTP": [], "muP": [], "SP": []}
    error: dict[str, list[tuple[float, float]]] = {"NTP": [], "muP": [], "SP": []}
    for n in widths:
        gamma = math.sqrt(n / 32)
        for seed in seeds:
            for name, rate, scale in (("NTP", 0.5, 1.0), ("muP", 0.5 * gamma**2, gamma), ("SP", 1 / n, 1.0)):
                net = Net((64, n, n, 1), seed, gamma=scale, standard=name == "SP").centre()
                monitor = Monitor(net, x, engine="layerwise", diagnostics=["relative_change", "linearization_error"])
                monitor.measure(0)
                descend(net, x, y, rate, 60 if quick else 200)
                found = monitor.measure(200).metrics
                change[name].append((n, found["relative_change"] or math.nan))
                error[name].append((n, found["linearization_error"] or math.nan))
    rows = [between("C1", f"{name}: slope of ‖ΔK‖/‖K₀‖ in width", slope(change[name]), *LAZY) for name in ("NTP", "SP")]
    rows.append(between("C1", "muP: slope of ‖ΔK‖/‖K₀‖ in width", slope(change["muP"]), -0.2, 0.3))
    rows += [
        between("C3", f"{name}: slope of the linearisation error in width", slope(error[name]), -1.2, -0.5)
        for name in ("NTP", "SP")
    ]
    return rows


def labels(quick: bool) -> list[Row]:
    """C7: the kernel aligns with true labels more than with random ones; C8: fast, then slow."""
    epochs = 6 if quick else 30
    true, distances = _run(False, epochs)
    random, _ = _run(True, epochs)
    rows = [
        between("C7", "true labels: ΔCKA with the targets", true, 0.05, 1.0),
        between("C7", "random labels: ΔCKA with the targets", random, -1.0, 0.05),
    ]
    early = distances[3] / distances[-1]
    return [*rows, between("C8", f"share of the distance of {epochs} epochs covered by epoch 3", early, 0.4, 1.0)]


def _run(shuffled: bool, epochs: int) -> tuple[float, list[float]]:
    """Change of the alignment with the trained labels on training probes, and the kernel distance by epoch."""
    x, y = digits(1000)
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    monitor = Monitor(net, (x[:64], y[:64]), engine="layerwise", diagnostics=["centered_alignment", "kernel_distance"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = [monitor.measure(0).metrics]
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        found.append(monitor.measure(epoch + 1).metrics)
    start, end = found[0]["centered_alignment"], found[-1]["centered_alignment"]
    assert start is not None
    assert end is not None
    return end - start, [m["kernel_distance"] or 0.0 for m in found]

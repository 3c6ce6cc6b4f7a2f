"""Synthetic records: runs whose motion follows a known power of the width, so that every slope has a known answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ntkwatch.record import Measurement, RecordWriter

STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
LAYERS = {"net.0.weight": 0.6, "net.0.bias": 0.1, "net.2.weight": 0.3}
REASON = "no motion yet: this is the baseline"
N = 8


def write_run(
    folder: Path,
    *,
    width: Any = 64,
    seed: int = 0,
    exponent: float = -1.0,
    noise: float = 0.0,
    strength: float = 20.0,
    steps: Sequence[int] = STEPS,
    hparams: Mapping[str, Any] | None = None,
    undefined: Mapping[str, str] | None = None,
    **manifest: Any,
) -> Path:
    """One record whose kernel angle at the last step is strength·width^exponent·e^(noise·g), g normal from `seed`."""
    generator = torch.Generator().manual_seed(1000 * seed + round(float(width)) if _is_number(width) else seed)
    kick = math.exp(noise * float(torch.randn((), generator=generator)))
    scale = strength * (float(width) if _is_number(width) else 1.0) ** exponent * kick
    writer = RecordWriter.create(folder / "ntkwatch", _manifest(width, seed, hparams) | manifest)
    k0, turned = _kernels(width, generator)
    previous = 0.0
    for i, step in enumerate(steps):
        time = math.log1p(step) / math.log1p(steps[-1] or 1)
        angle = min(scale * time, 1.5)
        metrics, reasons = _metrics(step, angle, (angle - previous) / max(step - steps[max(i - 1, 0)], 1))
        for name, reason in (undefined or {}).items():
            metrics[name], reasons[name] = None, reason
        kernel = k0 + math.tan(min(angle, 1.0)) * turned
        previous = angle
        writer.append(_measurement(step, metrics, reasons, kernel, angle))
    return folder


def write_sweep(root: Path, widths: Sequence[float] = (32, 64, 128, 256), seeds: int = 3, **kwargs: Any) -> list[Path]:
    """A run for each width and seed, in folders version_0, version_1, …"""
    pairs = [(width, seed) for width in widths for seed in range(seeds)]
    return [write_run(root / f"version_{i}", width=w, seed=s, **kwargs) for i, (w, s) in enumerate(pairs)]


def _is_number(width: Any) -> bool:
    return isinstance(width, int | float)


def _manifest(width: Any, seed: int, hparams: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "versions": {"ntkwatch": "0.1.0", "torch": "2.13.0"},
        "model": "MLP",
        "parameters": list(LAYERS),
        "n_parameters": 12345,
        "n_outputs": 2,
        "probes": {"n": N, "source": "val", "hash": "a" * 64, "targets_hash": "b" * 64, "how": "class-balanced"},
        "reduction": "trace",
        "engine": "layerwise",
        "mode": "eval",
        "precision": "double",
        "optimizer": "SGD",
        "hparams": {"width": width, "seed": seed, "lr": 0.1} if hparams is None else dict(hparams),
        "budget": 0.02,
        "every": "log",
        "seed": 0,
        "diagnostics": ["kernel_angle", "taylor_ratio"],
    }


def _kernels(width: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """K_0, whose deviation over seeds falls as width^−½, and a direction to turn in."""
    base = torch.eye(N, dtype=torch.float64) + 0.5
    wobble = torch.randn(N, N, dtype=torch.float64, generator=generator) / math.sqrt(float(width)) / 8
    labels = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(N // 2)
    return base + (wobble + wobble.T) / 2, labels[:, None] * labels * base.norm() / N


def _metrics(step: int, angle: float, velocity: float) -> tuple[dict[str, float | None], dict[str, str]]:
    metrics: dict[str, float | None] = {
        "kernel_distance": 1 - math.cos(angle),
        "kernel_angle": angle,
        "kernel_scale": angle / 2,
        "relative_change": angle * 1.1,
        "kernel_velocity": velocity if step else None,
        "centered_alignment": 0.1 + angle / 2,
        "centered_alignment_z": 4 + 30 * angle,
        "effective_rank": 5 + angle,
        "log10_lambda_max": 1 + angle / 5,
        "taylor_ratio": angle * 0.9 if step else None,
        "parameter_distance": angle / 3,
        "overhead": 0.0123,
    }
    return metrics, {
        "kernel_velocity": "first probe: nothing to compare with yet",
        "taylor_ratio": REASON,
    } if not step else {}


def _measurement(
    step: int, metrics: dict[str, float | None], reasons: dict[str, str], kernel: torch.Tensor, angle: float
) -> Measurement:
    modules = {"net.0": {"share": 0.7, "angle": angle / 2}, "net.2": {"share": 0.3, "angle": angle}}
    return Measurement(
        step=step,
        metrics=metrics,
        reasons=reasons,
        kernel=kernel,
        layers={name: share * kernel for name, share in LAYERS.items()},
        eigenvalues=torch.linalg.eigvalsh(kernel).flip(0),
        seconds=0.01,
        layer_metrics=modules,
        epoch=step // 50,
        outputs=torch.zeros(N, 2, dtype=torch.float64),
        context={"reduction": "trace", "engine": "layerwise", "mode": "eval", "probe_hash": "a" * 64},
    )

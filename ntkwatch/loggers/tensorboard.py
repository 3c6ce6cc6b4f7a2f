"""What TensorBoard shows beyond scalars: a layout of charts, a histogram of eigenvalues, a text about the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ntkwatch.record import Measurement

WRITER_METHODS = ("add_image", "add_histogram", "add_custom_scalars", "add_text")
CHARTS = {  # title → metrics of one unit; what is not named here gets a chart of its own
    "kernel angle to init (rad)": ("kernel_angle",),
    "kernel scale: log of the trace ratio to init": ("kernel_scale",),
    "Taylor ratio (0 linear … 1)": ("taylor_ratio",),
    "alignment with the targets (centred, CKA)": ("centered_alignment",),
    "alignment z-score against permuted labels": ("centered_alignment_z",),
    "log10 of the largest eigenvalue": ("log10_lambda_max",),
    "log10 of the top five eigenvalues": tuple(f"log10_lambda_{k}" for k in range(1, 6)),
    "effective rank": ("effective_rank",),
    "kernel velocity (rad per step)": ("kernel_velocity",),
    "kernel distance to init (1 − cos)": ("kernel_distance",),
    "relative change of the kernel": ("relative_change",),
    "relative distance to the infinitely wide kernel": ("distance_to_infinite",),
    "relative distance of the parameters": ("parameter_distance",),
    "loss on the probes, and had the network stayed linear": ("loss", "loss_if_lazy", "loss_if_flow"),
    "overhead (share of wall time)": ("overhead",),
}


def is_summary_writer(experiment: object) -> bool:
    """Whether a logger's `.experiment` offers what `torch.utils.tensorboard.SummaryWriter` does."""
    return all(hasattr(experiment, name) for name in WRITER_METHODS)


def layout(m: Measurement, tag: Callable[[str], str] = str) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars layout for what `m` holds, one unit a chart: category → title → [kind, tags].

    `tag` adds what the logger puts before a name. Tags are regular expressions there, matched from their beginning.
    """

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(tag(f'ntk/{name}'))}$" for name in names]]

    known = {title: [name for name in names if name in m.metrics] for title, names in CHARTS.items()}
    charts = {title: chart(*names) for title, names in known.items() if names}
    in_charts = {name for names in known.values() for name in names}
    charts |= {name.replace("_", " "): chart(name) for name in m.metrics if name not in in_charts}
    by_layer = dict.fromkeys(name for values in m.layer_metrics.values() for name in values)
    layers = {
        f"{name.replace('_', ' ')}, by module": ["Multiline", [f"{re.escape(tag('ntk_layers/'))}.*/{re.escape(name)}$"]]
        for name in by_layer
    }
    return {"NTK": charts} | ({"NTK by layer": layers} if layers else {})


def eigenvalue_histogram(m: Measurement) -> np.ndarray | None:
    """log10 of the positive eigenvalues; None where there are none."""
    positive = m.eigenvalues[torch.isfinite(m.eigenvalues) & (m.eigenvalues > 0)]
    return positive.log10().numpy() if len(positive) else None


def description(manifest: Mapping[str, Any]) -> str:
    """What the numbers are numbers of, as a Markdown table."""
    probes = manifest.get("probes") or {}
    rows = {name: manifest.get(name) for name in ("model", "n_parameters", "optimizer", "reduction", "engine")}
    rows |= {"why this engine": manifest.get("engine_reason"), "mode": manifest.get("mode")}
    rows |= {"precision": manifest.get("precision"), "BatchNorm": manifest.get("baseline")}
    rows |= {"probes": probes.get("n"), "chosen": probes.get("how"), "probe hash": probes.get("hash")}
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| ntkwatch | |", "|---|---|", *lines])

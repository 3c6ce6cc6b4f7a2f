"""Measurement → every logger of the run: TensorBoard, W&B, CSV, any other. One that fails is named once, no more.

Loggers, of either Lightning or of anyone else, are told apart by what they can do, never by their class. On the x axis
a point stands where the run's own metrics of that moment stand. On ranks other than 0 Lightning's loggers do nothing,
and so do these sinks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntkwatch import figures
from ntkwatch.record import Measurement

PATIENCE = 3  # failures in a row, after which a logger is left out: one that times out would cost its timeout each time
GROWTH = 2  # before the last, pictures are drawn when the step has grown by this factor since the latest …
SHARE = 0.01  # … and drawing takes no more than this share of wall time; the kernel of the first step waits with them
FIRST_PICTURES = 0.5  # seconds that they are expected to take, matplotlib's import included
STEP_KEYS = ("trainer/global_step", "global_step")  # W&B's x axis under Lightning; the same under sync_tensorboard
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


Picture = tuple[str, int, np.ndarray]  # tag, x, [height, width, 3] uint8


class Sinks:
    """All loggers of one run: anything with ``log_metrics(metrics, step)``; more is used where it is there.

    Call ``start`` once, ``write`` for each measurement, ``finish`` at the end. None of them raises because of a logger:
    ``warn`` gets one sentence for each logger that fails. ``values`` are for ``publish``.
    """

    def __init__(
        self, loggers: Sequence[object], warn: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._warn, self._clock = warn, clock
        self._began, self._drawing = clock(), 0.0
        self._outlets = [_Outlet(logger, warn) for logger in loggers if not _answers_anything(logger)]
        self._spectra: dict[int, Tensor] = {}
        self._drawn: int | None = None
        self._first: tuple[Measurement, Tensor | None, int] | None = None  # with labels and place on the x axis
        self._newest: tuple[Measurement, Tensor | None, int] | None = None
        self._draws = True
        self.values: dict[str, float] = {}
        """By tag, the newest defined value of everything logged so far."""

    def start(self, manifest: Mapping[str, Any], history: Mapping[int, Tensor] | None = None) -> None:
        """Before the first measurement; ``history``: eigenvalues by step, of a resumed run's earlier measurements."""
        for step, eigenvalues in sorted((history or {}).items()):
            self._remember(step, eigenvalues)
        for outlet in self._outlets:
            outlet.attempt("be set up", partial(outlet.start, manifest))

    def write(self, m: Measurement, labels: Tensor | None = None, last: bool = False, x: int | None = None) -> None:
        """Log one measurement; pictures now and then.

        ``labels``: the probes' raw targets, to sort the kernel by. ``x``: where it stands on the loggers' x axis, the
        measurement's own step by default.
        """
        x = m.step if x is None else x
        self._newest = (m, labels, x)
        if not self._spectra:  # its picture waits until there is time for one: an early import of matplotlib would hurt
            self._first = (replace(m, kernel=_trace(m.kernel), layers={}), labels, x)
        self._remember(m.step, m.eigenvalues)
        self.values |= m.as_flat()
        for outlet in self._outlets:
            outlet.attempt(f"log step {m.step}", partial(outlet.scalars, m, x))
        if last or (m.step >= GROWTH * (self._drawn or 0) and self._can_afford_pictures()):
            self._draw(m, labels, x)

    def finish(self) -> None:
        """Draw the last measurement if it has not been drawn, and leave everything on disk."""
        if self._newest is not None and self._drawn != self._newest[0].step:
            self._draw(*self._newest)
        for outlet in self._outlets:
            outlet.attempt("be saved", outlet.save)

    def _remember(self, step: int, eigenvalues: Tensor) -> None:
        """Keep the first spectrum, one each time the step has doubled, and the newest."""
        self._spectra.pop(step, None)
        *_, before, newest = (-1, -1, *self._spectra)
        if before >= 0 and newest < 2 * max(before, 0.5):
            del self._spectra[newest]
        self._spectra[step] = eigenvalues.detach().cpu()

    def _can_afford_pictures(self) -> bool:
        expected = max(FIRST_PICTURES, 2 * self._drawing)
        return expected <= SHARE * (self._clock() - self._began)

    def _draw(self, m: Measurement, labels: Tensor | None, x: int) -> None:
        """Each picture once, for all who take pictures; a fault in drawing is no logger's fault."""
        self._drawn = m.step
        takers = [outlet for outlet in self._outlets if outlet.takes_pictures]
        if not takers or not self._draws:
            return
        started = self._clock()
        try:
            pictures = self._pictures(m, labels, x)
        except Exception as error:
            self._draws = False
            self._warn(f"no pictures of the kernel could be drawn ({_words(error)}): the values are logged without.")
            return
        for outlet in takers:
            outlet.attempt("take pictures", partial(outlet.pictures, pictures))
        self._drawing += self._clock() - started

    def _pictures(self, m: Measurement, labels: Tensor | None, x: int) -> list[Picture]:
        """(tag, x, pixels), by ascending x, as TensorBoard wants them."""
        pictures = [("ntk/kernel", x, _kernel(m, labels)), ("ntk/spectra", x, _spectra(self._spectra, m))]
        first, self._first = self._first, None
        if first is not None and first[0].step < m.step:
            pictures.insert(0, ("ntk/kernel", first[2], _kernel(*first[:2])))
        return pictures


def publish(values: Mapping[str, float], callback_metrics: MutableMapping[str, Any]) -> None:
    """Put ``Sinks.values`` into ``trainer.callback_metrics``, as 0-d tensors, for ModelCheckpoint and EarlyStopping.

    They stop a run when a name that they monitor is gone or NaN, hence the newest *defined* value. For the same reason
    every rank needs the values, and needs them again after each sanity check, which empties the mapping.
    """
    callback_metrics.update({tag: torch.tensor(value, dtype=torch.float64) for tag, value in values.items()})


class _Outlet:
    """One logger, and what it can do beyond ``log_metrics``."""

    def __init__(self, logger: Any, warn: Callable[[str], None]) -> None:
        self._logger, self._warn = logger, warn
        self._warned, self._failures = False, 0
        self._writer: Any = None  # a SummaryWriter
        self._step_key: str | None = None  # of W&B
        self._laid_out = False

    @property
    def takes_pictures(self) -> bool:
        return self._writer is not None or self._step_key is not None

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Run ``action``; the first time it raises becomes this logger's warning."""
        if self._failures >= PATIENCE:
            return
        try:
            action()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{_name(self._logger)} could not {what} ({_words(error)}): training goes on and the record keeps "
                    f"every value; after {PATIENCE} failures in a row this logger is left out."
                )

    def start(self, manifest: Mapping[str, Any]) -> None:
        experiment: Any = getattr(self._logger, "experiment", None)
        if _answers_anything(experiment):
            return
        if all(hasattr(experiment, name) for name in ("add_image", "add_histogram", "add_custom_scalars", "add_text")):
            self._writer = experiment
            experiment.add_text(self._tag("ntk/about"), _about(manifest))
        elif hasattr(experiment, "define_metric") and hasattr(self._logger, "log_image"):
            synced = (getattr(self._logger, "_wandb_init", None) or {}).get("sync_tensorboard")
            self._step_key = STEP_KEYS[bool(synced)]
            for tags in ("ntk/*", "ntk_layers/*"):
                experiment.define_metric(self._tag(tags), step_metric=self._step_key)

    def scalars(self, m: Measurement, x: int) -> None:
        values = m.as_flat()
        if self._step_key == STEP_KEYS[True]:
            values[self._step_key] = x  # WandbLogger leaves the step out there
        self._logger.log_metrics(values, step=x)
        if self._writer is not None:
            self._events(m, x)
        self.save()

    def pictures(self, pictures: Sequence[Picture]) -> None:
        for tag, x, pixels in pictures:
            if self._writer is not None:
                self._writer.add_image(self._tag(tag), pixels, x, dataformats="HWC")
            else:
                self._logger.log_image(tag, [pixels], step=x)
        self.save()

    def save(self) -> None:
        """Dashboards are live: SummaryWriter would wait for two minutes, CSVLogger for a hundred steps."""
        if callable(save := getattr(self._logger, "save", None)):
            save()

    def _events(self, m: Measurement, x: int) -> None:
        if not self._laid_out:
            self._writer.add_custom_scalars(layout(m, self._tag))
            self._laid_out = True
        positive = m.eigenvalues[torch.isfinite(m.eigenvalues) & (m.eigenvalues > 0)]
        if len(positive):
            self._writer.add_histogram(self._tag("ntk/log10_eigenvalues"), positive.log10().numpy(), x, bins=30)

    def _tag(self, tag: str) -> str:
        prefix = getattr(self._logger, "_prefix", "")
        return f"{prefix}{getattr(self._logger, 'LOGGER_JOIN_CHAR', '-')}{tag}" if prefix else tag


class Memory:
    """A logger that remembers everything; for tests and notebooks. ``points`` are (step, metrics), in order."""

    name, version, save_dir, log_dir, root_dir = "memory", 0, None, None, None

    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.points.append((step, dict(metrics)))

    def curve(self, name: str) -> dict[int, float]:
        """step → value of one metric, the last point of a step."""
        return {step: metrics[name] for step, metrics in self.points if step is not None and name in metrics}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
    def log_graph(self, *args: Any, **kwargs: Any) -> None: ...
    def after_save_checkpoint(self, *args: Any) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...


def layout(m: Measurement, tag: Callable[[str], str] = str) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars layout for what ``m`` holds, one unit a chart: category → title → [kind, tags].

    ``tag`` adds what the logger puts before a name. Tags are regular expressions there, matched from their beginning.
    """

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f"{re.escape(tag(f'ntk/{name}'))}$" for name in names]]

    known = {title: [name for name in names if name in m.metrics] for title, names in CHARTS.items()}
    shown = {title: chart(*names) for title, names in known.items() if names}
    named = {name for names in known.values() for name in names}
    shown |= {name.replace("_", " "): chart(name) for name in m.metrics if name not in named}
    parts = dict.fromkeys(name for values in m.layer_metrics.values() for name in values)
    layers = {
        f"{name.replace('_', ' ')}, by module": ["Multiline", [f"{re.escape(tag('ntk_layers/'))}.*/{re.escape(name)}$"]]
        for name in parts
    }
    return {"NTK": shown} | ({"NTK by layer": layers} if layers else {})


def _about(manifest: Mapping[str, Any]) -> str:
    """What the numbers are numbers of, as a Markdown table."""
    probes = manifest.get("probes") or {}
    rows = {name: manifest.get(name) for name in ("model", "n_parameters", "optimizer", "reduction", "engine")}
    rows |= {"why this engine": manifest.get("engine_reason"), "mode": manifest.get("mode")}
    rows |= {"precision": manifest.get("precision"), "BatchNorm": manifest.get("baseline")}
    rows |= {"probes": probes.get("n"), "chosen": probes.get("how"), "probe hash": probes.get("hash")}
    lines = [f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| ntkwatch | |", "|---|---|", *lines])


def _spectra(spectra: Mapping[int, Tensor], m: Measurement) -> np.ndarray:
    floor = m.context.get("noise_floor")
    return figures.rgb(figures.spectra(spectra, noise_floor=float(floor) if isinstance(floor, int | float) else None))


def _kernel(m: Measurement, labels: Tensor | None) -> np.ndarray:
    caption = f"step {m.step}, reduction {m.context.get('reduction', 'trace')}"
    return figures.rgb(figures.kernel_heatmap(_trace(m.kernel), _classes(labels), caption=caption))


def _trace(kernel: Tensor) -> Tensor:
    """[n, n] to look at: blocks [C, n, n] and a full kernel [n, C, n, C] by their mean over outputs."""
    if kernel.ndim == 3:
        return kernel.mean(0)
    return kernel.diagonal(dim1=1, dim2=3).mean(-1) if kernel.ndim == 4 else kernel


def _classes(labels: Tensor | None) -> Tensor | None:
    """[n] classes or values to sort by; one-hot rows become their class; several regression targets have no order."""
    if labels is None or labels.ndim == 1:
        return labels
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] == 1:
        return flat[:, 0]
    one_hot = bool(((flat == 0) | (flat == 1)).all()) and bool((flat.sum(1) == 1).all())
    return flat.argmax(1) if one_hot else None


def _answers_anything(thing: object) -> bool:
    """A stand-in that accepts every name, as Lightning's dummies of a fast run and of ranks other than 0 do."""
    try:
        return hasattr(thing, "ntkwatch_asks_for_a_name_that_nobody_has")
    except Exception:
        return False


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _name(logger: object) -> str:
    try:
        where = next((place for name in ("log_dir", "save_dir") if (place := getattr(logger, name, None))), None)
    except Exception:
        where = None
    return f"{type(logger).__name__} ({where})" if where else type(logger).__name__

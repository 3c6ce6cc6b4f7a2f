"""How one logger is called: an adapter for each of the forms that loggers have, chosen by what a logger offers.

| a logger that offers | gets |
|---|---|
| `log_metrics(metrics, step)` | numbers |
| … and `log_image(key, images, step=…)` | … and pictures |
| … and an `.experiment` with W&B's `define_metric` | … on the x axis of the run's own metrics |
| … and an `.experiment` that is a SummaryWriter | numbers, pictures, histograms, a layout of charts |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ntkwatch.loggers.pictures import Picture
from ntkwatch.loggers.tensorboard import description, eigenvalue_histogram, is_summary_writer, layout
from ntkwatch.record import Measurement

STEP_KEYS = ("trainer/global_step", "global_step")  # W&B's x axis under Lightning; the same under sync_tensorboard


class LoggerAdapter(Protocol):
    """What a `LoggerGroup` asks of each logger. Any method may raise: the group catches it and warns.

    Attributes:
        takes_pictures: whether `log_pictures` shows anything. Pictures are drawn only where one adapter takes them.
    """

    takes_pictures: bool

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Prepare the logger before the first measurement."""

    def log(self, measurement: Measurement, x: int) -> None:
        """Log the numbers of one measurement at `x`."""

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Log pictures."""

    def save(self) -> None:
        """Flush what was logged, to disk or to a server. The group calls it after each `log` and `log_pictures`."""


class MetricsAdapter:
    """Numbers alone, for a logger that offers `log_metrics(metrics, step)`."""

    takes_pictures = False

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def start(self, manifest: Mapping[str, Any]) -> None:
        """A plain logger needs no preparation."""

    def log(self, measurement: Measurement, x: int) -> None:
        """Log the defined values of one measurement."""
        self._logger.log_metrics(self._values(measurement, x), step=x)

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """A plain logger shows no pictures."""

    def save(self) -> None:
        """Dashboards are live: SummaryWriter would wait for two minutes, CSVLogger for a hundred steps."""
        if callable(save := getattr(self._logger, "save", None)):
            save()

    def _values(self, measurement: Measurement, x: int) -> dict[str, float]:
        return measurement.as_flat()

    def _tag(self, tag: str) -> str:
        """The name under which the logger stores `tag`: Lightning's loggers put a prefix before it."""
        prefix = getattr(self._logger, "_prefix", "")
        return f"{prefix}{getattr(self._logger, 'LOGGER_JOIN_CHAR', '-')}{tag}" if prefix else tag


class ImageAdapter(MetricsAdapter):
    """Numbers and pictures, for a logger that also offers `log_image(key, images, step=…)`, as WandbLogger does."""

    takes_pictures = True

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Log each picture as a list of one [height, width, 3] uint8 array."""
        for picture in pictures:
            self._logger.log_image(picture.tag, [picture.pixels], step=picture.x)


class WandbAdapter(ImageAdapter):
    """An `ImageAdapter` that puts the numbers on the x axis of the run's own metrics."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._synced = bool((getattr(logger, "_wandb_init", None) or {}).get("sync_tensorboard"))
        self._step_key = STEP_KEYS[self._synced]

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Name the metric that serves as x axis."""
        for tags in ("ntk/*", "ntk_layers/*"):
            self._logger.experiment.define_metric(self._tag(tags), step_metric=self._step_key)

    def _values(self, measurement: Measurement, x: int) -> dict[str, float]:
        """With the step where WandbLogger leaves it out."""
        return measurement.as_flat() | ({self._step_key: x} if self._synced else {})


class TensorBoardAdapter(MetricsAdapter):
    """Numbers, pictures, a histogram of eigenvalues and a layout of charts, for a logger with a SummaryWriter."""

    takes_pictures = True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._writer: Any = logger.experiment
        self._has_layout = False

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Write what the numbers are numbers of."""
        self._writer.add_text(self._tag("ntk/about"), description(manifest))

    def log(self, measurement: Measurement, x: int) -> None:
        """Log the defined values; the first measurement also decides the charts."""
        super().log(measurement, x)
        if not self._has_layout:
            self._writer.add_custom_scalars(layout(measurement, self._tag))
            self._has_layout = True
        values = eigenvalue_histogram(measurement)
        if values is not None:
            self._writer.add_histogram(self._tag("ntk/log10_eigenvalues"), values, x, bins=30)

    def log_pictures(self, pictures: Sequence[Picture]) -> None:
        """Log each picture at its own x."""
        for picture in pictures:
            self._writer.add_image(self._tag(picture.tag), picture.pixels, picture.x, dataformats="HWC")


def adapter_for(logger: Any) -> LoggerAdapter:
    """The adapter that uses the most of what `logger` offers. A logger of a new form gets a branch here.

    Loggers, of either Lightning or of anyone else, are told apart by their methods, never by their class.
    """
    experiment = getattr(logger, "experiment", None)
    if accepts_any_name(experiment):
        return MetricsAdapter(logger)
    if is_summary_writer(experiment):
        return TensorBoardAdapter(logger)
    if not callable(getattr(logger, "log_image", None)):
        return MetricsAdapter(logger)
    return WandbAdapter(logger) if hasattr(experiment, "define_metric") else ImageAdapter(logger)


def accepts_any_name(thing: object) -> bool:
    """Whether `thing` is a stand-in with every attribute, as Lightning's dummies of a fast run and of other ranks."""
    try:
        return hasattr(thing, "ntkwatch_asks_for_a_name_that_nobody_has")
    except Exception:
        return False

"""Each form of logger gets the adapter that uses the most of it; a logger of twenty lines gets numbers and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ntkwatch.loggers import pictures
from ntkwatch.loggers.adapters import ImageAdapter, MetricsAdapter, TensorBoardAdapter, WandbAdapter, adapter_for
from ntkwatch.loggers.group import LoggerGroup
from ntkwatch.loggers.memory import Memory
from ntkwatch.record import Measurement


class TrackerLogger:
    """A logger as a user writes one for Trackio and the like: numbers and images, without `.experiment`."""

    def __init__(self) -> None:
        self.numbers: dict[int, dict[str, float]] = {}
        self.images: list[tuple[str, int, np.ndarray]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.numbers[step] = dict(metrics)

    def log_image(self, key: str, images: Sequence[np.ndarray], step: int | None = None) -> None:
        assert step is not None
        self.images += [(key, step, image) for image in images]


def measurement(step: int) -> Measurement:
    kernel = torch.eye(4, dtype=torch.float64) * (step + 1)
    return Measurement(step, {"kernel_angle": step / 10}, {}, kernel, {}, kernel.diagonal(), 0.1)


def write(logger: Any, warn: Any = pytest.fail) -> None:
    group = LoggerGroup([logger], warn)
    group.start({"model": "MLP"})
    for step in range(3):
        group.write(measurement(step), torch.tensor([0, 1, 0, 1]), x=100 + step)
    group.finish()


def test_a_logger_of_twenty_lines_gets_numbers_and_pictures() -> None:
    logger = TrackerLogger()
    write(logger)
    assert {x: values["ntk/kernel_angle"] for x, values in logger.numbers.items()} == {100: 0.0, 101: 0.1, 102: 0.2}
    assert [(key, x) for key, x, _ in logger.images] == [("ntk/kernel", 100), ("ntk/kernel", 102), ("ntk/spectra", 102)]
    for _, _, image in logger.images:
        assert (image.ndim, image.shape[2], image.dtype) == (3, 3, np.uint8)
        assert len(np.unique(image)) > 2, "an empty picture"


def test_a_log_image_of_another_signature_costs_the_pictures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyless(TrackerLogger):
        def log_image(self, image: np.ndarray) -> None:  # type: ignore[override]
            raise AssertionError("not reached: the call does not fit")

    monkeypatch.setattr(pictures, "kernel_picture", lambda *args: np.zeros((2, 2, 3), np.uint8))
    monkeypatch.setattr(pictures, "spectra_picture", lambda *args: np.zeros((2, 2, 3), np.uint8))
    logger, warnings = Keyless(), []
    write(logger, warnings.append)
    assert list(logger.numbers) == [100, 101, 102]
    (warning,) = warnings
    assert "Keyless could not take pictures (TypeError: " in warning
    assert "log_image" in warning


class SummaryWriterLike:
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_image(self, key: str, images: Sequence[Any], step: int) -> None: ...
    def add_image(self, *args: Any) -> None: ...
    def add_histogram(self, *args: Any) -> None: ...
    def add_custom_scalars(self, *args: Any) -> None: ...
    def add_text(self, *args: Any) -> None: ...


class WandbLike(TrackerLogger):
    @property
    def experiment(self) -> Any:
        return self

    def define_metric(self, name: str, step_metric: str) -> None: ...


def test_a_logger_is_told_by_what_it_offers(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.loggers.logger import DummyLogger

    with_writer = SummaryWriterLike()
    with_writer.experiment = with_writer  # type: ignore[attr-defined]
    for logger, kind in (
        (Memory(), MetricsAdapter),
        (CSVLogger(str(tmp_path)), MetricsAdapter),
        (DummyLogger(), MetricsAdapter),
        (TrackerLogger(), ImageAdapter),
        (WandbLike(), WandbAdapter),
        (with_writer, TensorBoardAdapter),  # a writer shows more than images do
        (TensorBoardLogger(str(tmp_path)), TensorBoardAdapter),
    ):
        adapter = adapter_for(logger)
        assert type(adapter) is kind, logger
        assert adapter.takes_pictures == (kind is not MetricsAdapter)

"""A logger that keeps every point in memory, for tests and notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Memory:
    """A Lightning logger without files. `points` are (step, metrics), in the order in which they were logged."""

    name, version, save_dir, log_dir, root_dir = "memory", 0, None, None, None

    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep one point."""
        self.points.append((step, dict(metrics)))

    def curve(self, name: str) -> dict[int, float]:
        """step → value of one metric; the last point of a step counts."""
        return {step: metrics[name] for step, metrics in self.points if step is not None and name in metrics}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...
    def log_graph(self, *args: Any, **kwargs: Any) -> None: ...
    def after_save_checkpoint(self, *args: Any) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...

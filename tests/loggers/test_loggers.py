"""The loggers: every logger gets every defined number at its step, and no logger can stop a run."""

from __future__ import annotations

import csv
import dataclasses
import errno
import importlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from ntkwatch.loggers import group, pictures
from ntkwatch.loggers.group import LoggerGroup, publish
from ntkwatch.loggers.memory import Memory
from ntkwatch.loggers.tensorboard import layout
from ntkwatch.record import Measurement

N = 8
STEPS = (0, 1, 2, 3, 5, 8, 13)
LABELS = torch.tensor([1, 0, 1, 0, 2, 2, 0, 1])
MANIFEST = {"model": "MLP", "reduction": "trace", "engine": "layerwise", "probes": {"n": N, "hash": "ab|cd"}}


def measurement(step: int) -> Measurement:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 20, dtype=torch.float64, generator=generator)
    kernel = x @ x.T
    metrics: dict[str, float | None] = {
        "kernel_angle": step / 7,
        "relative_change": 60.0 * step + 1e-9,
        "kernel_velocity": None if step == 0 else 1e-12 / step,
        "log10_lambda_1": -3.25 - step,
        "log10_lambda_max": -3.25 - step,
        "taylor_ratio": math.nan if step == 1 else 0.5,
        "a_new_diagnostic": 1 / (step + 1),
    }
    layers = {"net.0": {"share": 0.25, "angle": None}, "": {"share": 0.75, "angle": step / 9}}
    eigenvalues = torch.linalg.eigvalsh(kernel).flip(0)
    return Measurement(step, metrics, {}, kernel, {}, eigenvalues, 0.1, layers, context={"reduction": "trace"})


MEASURED = {step: measurement(step) for step in STEPS}


def at(step: int) -> Measurement:
    return dataclasses.replace(MEASURED[0], step=step)


def expected(prefix: str = "") -> dict[str, dict[int, float]]:
    """tag → step → value of everything that must come back."""
    curves: dict[str, dict[int, float]] = {}
    for step, m in MEASURED.items():
        for tag, value in m.as_flat().items():
            curves.setdefault(prefix + tag, {})[step] = value
    return curves


def feed(
    loggers: list[Any], warn: Callable[[str], None] = pytest.fail, clock: Callable[[], float] | None = None
) -> LoggerGroup:
    fed = LoggerGroup(loggers, warn, **({"clock": clock} if clock is not None else {}))
    fed.start(MANIFEST)
    for step, m in MEASURED.items():
        for logger in loggers:
            logger.log_metrics({"train_loss": 1.0 / (step + 1)}, step=step)  # the user's own rows in between
        fed.write(m, LABELS, last=step == STEPS[-1])
    return fed


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> ModuleType:
    importlib.import_module(f"{request.param}.loggers")
    return importlib.import_module(request.param)


# ── read back ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def events(folder: str | Path) -> EventAccumulator:
    sizes = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    accumulator = EventAccumulator(str(folder), size_guidance=sizes)
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("prefix", ["", "a(b)"])
def test_tensorboard_holds_every_number_at_its_step_before_the_run_ends(
    pl: ModuleType, prefix: str, tmp_path: Path
) -> None:
    logger = pl.loggers.TensorBoardLogger(str(tmp_path), prefix=prefix)
    feed([logger])  # neither finished nor closed: the run goes on
    found = events(logger.log_dir)
    front = f"{prefix}-" if prefix else ""
    curves = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert curves.pop(f"{front}train_loss") == {step: np.float32(1 / (step + 1)) for step in STEPS}
    wanted = {tag: {s: np.float32(v) for s, v in curve.items()} for tag, curve in expected(front).items()}
    assert curves == wanted
    assert sum(map(len, curves.values())) > 50


class Slow:
    """A logger and a clock: every point takes 10 s."""

    now = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.now += 10

    def __call__(self) -> float:
        return self.now


def test_tensorboard_holds_pictures_histograms_a_layout_and_what_it_is_about(pl: ModuleType, tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(str(tmp_path))
    slow = Slow()
    feed([logger, slow], clock=slow)
    found = events(logger.log_dir)
    for tag, steps in {"ntk/spectra": [2, 5, 13], "ntk/kernel": [0, 2, 5, 13]}.items():
        pictures = found.Images(tag)
        assert [picture.step for picture in pictures] == steps
        assert all(picture.encoded_image_string.startswith(b"\x89PNG") and picture.width > 500 for picture in pictures)
    for event, (step, m) in zip(found.Histograms("ntk/log10_eigenvalues"), MEASURED.items(), strict=True):
        logs = m.eigenvalues.log10()
        histogram = event.histogram_value
        assert event.step == step
        assert (histogram.min, histogram.max, histogram.num) == pytest.approx((float(logs.min()), float(logs.max()), N))
        assert sum(histogram.bucket) == N
    read = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in read.category] == ["NTK", "NTK by layer"]
    about = found.Tensors("ntk/about/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| reduction | trace |" in about
    assert "| probe hash | ab/cd |" in about


def csv_rows(logger: Any) -> tuple[list[dict[str, str]], dict[str, dict[int, float]]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tags = [tag for tag in rows[0] if tag != "step"]
    return rows, {tag: {int(row["step"]): float(row[tag]) for row in rows if row[tag]} for tag in tags}


@pytest.mark.parametrize("prefix", ["", "p"])
def test_csv_holds_every_number_at_its_step_before_the_run_ends(pl: ModuleType, prefix: str, tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path), prefix=prefix, flush_logs_every_n_steps=10**9)
    feed([logger])
    front = f"{prefix}-" if prefix else ""
    rows, curves = csv_rows(logger)
    assert curves.pop(f"{front}train_loss") == {step: 1 / (step + 1) for step in STEPS}
    assert curves == expected(front)
    assert len(rows) == 2 * len(STEPS), "a row of the user's and a row of ours at each step"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    reason = "wandb is not installed: pip install ntkwatch[wandb]"
    module: ModuleType = pytest.importorskip("wandb", reason=reason)
    monkeypatch.setenv("WANDB_MODE", "offline")  # WandbLogger(offline=True) sets it: put back afterwards
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield module
    module.finish()


def wandb_records(root: Path) -> list[dict[str, Any]]:
    (run,) = root.glob("wandb/offline-run-*")
    command = [
        shutil.which("wandb") or str(Path(sys.executable).with_name("wandb")),
        "leet",
        "inspect",
        "--json",
        str(run),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in said.stdout.splitlines()]


def wandb_curves(records: list[dict[str, Any]], axis: str = "trainer/global_step") -> dict[str, dict[int, float]]:
    curves: dict[str, dict[int, float]] = {}
    for item in (record["history"]["item"] for record in records if record["type"] == "history"):
        for tag, value in item.items():
            if isinstance(value, int | float) and not tag.startswith("_") and "." not in tag.rsplit("/", 1)[-1]:
                curves.setdefault(tag, {})[item[axis]] = value
    curves.pop(axis)
    return curves


@pytest.mark.parametrize("prefix", ["", "p"])
def test_wandb_holds_every_number_at_its_step(pl: ModuleType, prefix: str, wandb: ModuleType, tmp_path: Path) -> None:
    feed([pl.loggers.WandbLogger(save_dir=str(tmp_path), offline=True, prefix=prefix)])
    wandb.finish()
    records = wandb_records(tmp_path)
    front = f"{prefix}-" if prefix else ""
    curves = wandb_curves(records)
    assert curves.pop(f"{front}train_loss") == {step: 1 / (step + 1) for step in STEPS}, "the user's rows"
    assert curves == expected(front)
    axes = {r["metric"].get("glob_name"): r["metric"].get("step_metric") for r in records if r["type"] == "metric"}
    assert axes[f"{front}ntk/*"] == axes[f"{front}ntk_layers/*"] == "trainer/global_step"
    for name, number in {"spectra": 1, "kernel": 2}.items():
        pictures = [p for p in tmp_path.rglob(f"*{name}_*.png") if p.read_bytes().startswith(b"\x89PNG")]
        assert len(pictures) == number, f"{name}: the last step's, and the kernel of the first"


def test_wandb_that_syncs_tensorboard_gets_its_own_step(wandb: ModuleType, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=str(tmp_path), offline=True, sync_tensorboard=True)
    fed = LoggerGroup([logger], pytest.fail)
    fed.start(MANIFEST)
    fed.write(MEASURED[5])
    wandb.finish()
    assert wandb_curves(wandb_records(tmp_path), "global_step")["ntk/kernel_angle"] == {5: 5 / 7}


def test_any_logger_that_can_log_metrics_will_do() -> None:
    class Bare:
        def __init__(self) -> None:
            self.points: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.points.append((step, metrics))

    bare, memory = Bare(), Memory()
    feed([bare, memory])
    assert {tag: memory.curve(tag) for tag in expected()} == expected()
    assert bare.points == memory.points


def test_no_logger_at_all_is_fine() -> None:
    fed = feed([])
    fed.finish()
    assert fed.values["ntk/kernel_angle"] == 13 / 7


def test_loggers_see_finite_floats_only() -> None:
    class Strict:
        def log_metrics(self, metrics: dict[str, Any], step: Any) -> None:
            assert type(step) is int
            assert all(
                type(tag) is str and type(value) is float and math.isfinite(value) for tag, value in metrics.items()
            )

    feed([Strict()])


def test_writing_draws_no_random_number(pl: ModuleType, tmp_path: Path) -> None:
    loggers = [pl.loggers.TensorBoardLogger(str(tmp_path)), pl.loggers.CSVLogger(str(tmp_path))]
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()  # noqa: NPY002
    feed(loggers).finish()
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist())  # noqa: NPY002


# ── in a Trainer ──────────────────────────────────────────────────────────────────────────────────────────────────────
def trained(pl: ModuleType, root: Path, logger: Any, config: str, watch: bool = True) -> dict[int, dict[str, float]]:
    """Train a little with the loggers fed in on_train_batch_end; what was written, by step."""
    written: dict[int, dict[str, float]] = {}
    torch.manual_seed(0)

    class Model(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.automatic_optimization = config != "two optimizers"

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch[0]).square().mean()
            self.log("train_loss", loss, on_step=True)
            if config == "two optimizers":
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD([p], lr=0.1) for p in self.layer.parameters()]
            return optimizers if config == "two optimizers" else torch.optim.SGD(self.parameters(), lr=0.1)

    class Feed(pl.Callback):  # type: ignore[name-defined, misc]
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.fed = LoggerGroup(trainer.loggers, pytest.fail)
            self.fed.start(MANIFEST)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
            if config == "accumulation" and trainer.fit_loop.epoch_loop._should_accumulate():
                return
            m = measurement(step)
            written[step] = m.as_flat()
            self.fed.write(m, LABELS)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(24, 4)), batch_size=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}

    def fit(epochs: int, checkpoint: str | None = None) -> Any:
        accumulate = 3 if config == "accumulation" else 1
        trainer = pl.Trainer(
            default_root_dir=root, logger=logger, max_epochs=epochs, accumulate_grad_batches=accumulate,
            callbacks=[Feed()] if watch else [], enable_checkpointing=config == "resume", **quiet,
        )  # fmt: skip
        trainer.fit(Model(), data, ckpt_path=checkpoint)
        return trainer

    trainer = fit(1)
    if config == "resume":
        trainer.save_checkpoint(root / "last.ckpt")
        fit(2, str(root / "last.ckpt"))
    return written


CONFIGS = ("plain", "accumulation", "two optimizers", "resume")
SLOW = {("WandbLogger", "plain"), ("WandbLogger", "two optimizers")}  # seconds each: with the soak


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(kind, config, marks=pytest.mark.soak if (kind, config) in SLOW else ())
        for kind in ("TensorBoardLogger", "CSVLogger", "WandbLogger")
        for config in CONFIGS
    ],
)
def test_no_point_is_lost_in_a_trainer_ours_or_the_users(
    kind: str, config: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pl = importlib.import_module("lightning.pytorch")
    importlib.import_module("lightning.pytorch.loggers")
    found = {}
    for watch in (False, True):
        root = tmp_path / str(watch)
        options = {"offline": True} if kind == "WandbLogger" else {}
        module = request.getfixturevalue("wandb") if kind == "WandbLogger" else None
        logger = getattr(pl.loggers, kind)(save_dir=str(root), **options)
        written = trained(pl, root, logger, config, watch)
        if module is not None:
            module.finish()
        found[watch] = read_back(kind, root, logger)
    ours = {tag: curve for tag, curve in found[True].items() if tag.startswith("ntk")}
    theirs = {tag: curve for tag, curve in found[True].items() if not tag.startswith("ntk")}
    cast = np.float32 if kind == "TensorBoardLogger" else float
    wanted: dict[str, dict[int, float]] = {}
    for step, values in written.items():
        for tag, value in values.items():
            wanted.setdefault(tag, {})[step] = cast(value)
    assert ours == wanted
    assert len(wanted["ntk/kernel_angle"]) == {"accumulation": 4, "resume": 24}.get(config, 12)
    assert theirs == found[False], "the user's own points"
    assert len(theirs["train_loss"]) == len(wanted["ntk/kernel_angle"])


def read_back(kind: str, root: Path, logger: Any) -> dict[str, dict[int, float]]:
    if kind == "WandbLogger":
        return wandb_curves(wandb_records(root))
    if kind == "CSVLogger":
        return csv_rows(logger)[1]
    found = events(logger.log_dir)
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"] if tag != "hp_metric"}


# ── a logger that fails ───────────────────────────────────────────────────────────────────────────────────────────────
ERRORS: dict[str, Callable[[], Exception]] = {
    "OSError": lambda: OSError("no such device"),
    "ENOSPC": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "ValueError": lambda: ValueError("you tried to log a string"),
    "timeout": lambda: TimeoutError("the server does not answer"),
    "RuntimeError": lambda: RuntimeError("no run in progress"),
}


def lightning_logger(kind: str, root: Path) -> Any:
    loggers = importlib.import_module("lightning.pytorch.loggers")
    return getattr(loggers, kind)(save_dir=str(root))


PLACES: dict[str, Callable[[Path, pytest.MonkeyPatch, Callable[..., Any]], Any]] = {}


def place(make: Callable[[Path, pytest.MonkeyPatch, Callable[..., Any]], Any]) -> None:
    PLACES[make.__name__.replace("_", " ")] = make


def _broken(kind: str, name: str) -> Callable[[Path, pytest.MonkeyPatch, Callable[..., Any]], Any]:
    def make(root: Path, patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> Any:
        logger = Memory() if kind == "Memory" else lightning_logger(kind, root)
        patch.setattr(logger, name, fail)
        return logger

    make.__name__ = f"{kind} {name}"
    return make


for _kind in ("TensorBoardLogger", "CSVLogger", "Memory"):
    for _name in ("log_metrics", "save"):
        place(_broken(_kind, _name))


@place
def TensorBoardLogger_pictures(root: Path, patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> Any:
    logger = lightning_logger("TensorBoardLogger", root)
    patch.setattr(logger.experiment, "add_image", fail)
    return logger


@place
def CSVLogger_experiment(root: Path, patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> Any:
    logger = lightning_logger("CSVLogger", root)
    patch.setattr(type(logger), "experiment", property(fail))
    return logger


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", PLACES)
def test_a_logger_that_fails_is_named_once_and_the_others_get_everything(
    where: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 places × 5 errors = 40 cells."""
    monkeypatch.setattr(pictures, "kernel_picture", no_picture)
    monkeypatch.setattr(pictures, "spectra_picture", no_picture)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ERRORS[error]()

    said: list[str] = []
    broken, memory = PLACES[where](tmp_path, monkeypatch, fail), Memory()
    fed = LoggerGroup([broken, memory], said.append)
    fed.start(MANIFEST)
    for step, m in MEASURED.items():
        fed.write(m, LABELS, last=step == STEPS[-1])
    fed.finish()
    assert {tag: memory.curve(tag) for tag in expected()} == expected()
    assert len(said) == 1, said
    assert type(broken).__name__ in said[0]
    assert str(ERRORS[error]()) in said[0]
    assert "training goes on" in said[0]


def test_a_logger_that_fails_again_and_again_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Dead:
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            calls.append(step)
            raise TimeoutError

    feed_quietly([Dead()])
    assert calls == list(STEPS[: group.FAILURES_IN_A_ROW])


def test_a_logger_that_recovers_goes_on() -> None:
    class Shaky(Memory):
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if step in (1, 2, 5, 8):
                raise OSError
            super().log_metrics(metrics, step)

    shaky = Shaky()
    assert len(feed_quietly([shaky])) == 1
    assert [step for step, _ in shaky.points] == [0, 3, 13]


def feed_quietly(loggers: list[Any]) -> list[str]:
    said: list[str] = []
    fed = LoggerGroup(loggers, said.append)
    fed.start(MANIFEST)
    for m in MEASURED.values():
        fed.write(m)
    fed.finish()
    return said


def test_a_logger_whose_every_attribute_raises_is_survived() -> None:
    class Hostile:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(f"no {name}")

    (warning,) = feed_quietly([Hostile()])
    assert "Hostile could not" in warning


def test_a_picture_that_cannot_be_drawn_is_no_loggers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("no matplotlib")

    monkeypatch.setattr("ntkwatch.figures.kernel_heatmap", fail)
    logger = lightning_logger("TensorBoardLogger", tmp_path)
    (warning,) = feed_quietly([logger])
    assert "no pictures of the kernel could be drawn (ImportError: no matplotlib)" in warning
    assert len(events(logger.log_dir).Scalars("ntk/kernel_angle")) == len(STEPS)


def test_keyboard_interrupt_passes_through() -> None:
    class Slow:
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feed_quietly([Slow()])


# ── stand-ins and other ranks ─────────────────────────────────────────────────────────────────────────────────────────
def test_a_dummy_logger_gets_nothing(pl: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    dummies = importlib.import_module(f"{pl.__name__}.loggers.logger")
    monkeypatch.setattr(dummies.DummyLogger, "log_metrics", lambda *a, **k: pytest.fail("a dummy was written to"))
    assert feed_quietly([dummies.DummyLogger()]) == []


def test_other_ranks_write_no_file(pl: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_zero = importlib.import_module("lightning_utilities.core.rank_zero")
    monkeypatch.setattr(rank_zero.rank_zero_only, "rank", 1, raising=False)
    loggers = [pl.loggers.TensorBoardLogger(str(tmp_path), version=0), pl.loggers.CSVLogger(str(tmp_path), version=1)]
    assert feed_quietly(loggers) == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ── pictures now and then ─────────────────────────────────────────────────────────────────────────────────────────────
def no_picture(*args: Any) -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8)


class Gallery:
    """A logger with the face of a SummaryWriter."""

    def __init__(self, clock: list[float], cost: float) -> None:
        self.drawn: list[int] = []
        self.experiment, self._clock, self._cost = self, clock, cost

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def add_histogram(self, *args: Any, **kwargs: Any) -> None: ...
    def add_custom_scalars(self, *args: Any) -> None: ...
    def add_text(self, *args: Any) -> None: ...

    def add_image(self, tag: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        assert step >= max(self.drawn, default=0), "TensorBoard drops what comes after a larger step"
        assert (pixels.dtype, pixels.ndim, dataformats) == (np.uint8, 3, "HWC")
        if tag == "ntk/kernel":
            self.drawn.append(step)
            self._clock[0] += self._cost


@pytest.mark.parametrize(
    ("pace", "cost", "last", "drawn"),
    [
        (100.0, 0.2, True, [0, 1, 2, 4, 8, 16, 20]),  # slow steps: whenever the step has doubled
        (10.0, 0.2, True, [0, 4, 8, 16, 20]),  # the first kernel comes late, with the first that there is time for
        (3.0, 0.2, True, [0, 16, 20]),
        (0.001, 0.2, True, [0, 20]),  # a short run: the first and the last, at its end
        (0.001, 0.0, False, [0, 20]),  # nobody said which is the last: finish draws it
    ],
)
def test_pictures_are_drawn_first_last_and_as_time_allows(
    pace: float, cost: float, last: bool, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "kernel_picture", no_picture)
    monkeypatch.setattr(pictures, "spectra_picture", no_picture)
    clock = [0.0]
    gallery = Gallery(clock, cost)
    fed = LoggerGroup([gallery], pytest.fail, clock=lambda: clock[0])
    fed.start(MANIFEST)
    for step in range(21):
        clock[0] += pace
        fed.write(at(step), last=last and step == 20)
    fed.finish()
    assert gallery.drawn == drawn


def test_spectra_are_kept_at_doubling_steps_and_across_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = LoggerGroup([], pytest.fail)
    fed.start(MANIFEST, history={step: torch.ones(2) for step in range(11)})
    for step in range(11, 100):
        fed.write(at(step))
    assert list(fed._spectra.by_step) == [0, 1, 2, 4, 8, 16, 32, 64, 99]
    every_hundred = LoggerGroup([], pytest.fail)
    for step in range(0, 2500, 100):
        every_hundred.write(at(step))
    assert list(every_hundred._spectra.by_step) == [0, 100, 200, 400, 800, 1600, 2400]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (None, None),
        (torch.tensor([2, 0, 1]), [2, 0, 1]),
        (torch.tensor([0.5, -1.0, 2.0]), [0.5, -1.0, 2.0]),
        (torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), [1, 0, 1]),
        (torch.tensor([[0.5], [1.5], [-0.5]]), [0.5, 1.5, -0.5]),
        (torch.tensor([[0.5, 1.0], [1.5, 2.0], [0.0, 1.0]]), None),
    ],
)
def test_targets_of_any_kind_sort_the_kernel_or_leave_it(
    labels: torch.Tensor | None, classes: list[float] | None
) -> None:
    found = pictures.sort_key(labels)
    assert (found.tolist() if found is not None else None) == classes


def test_a_kernel_of_any_reduction_is_shown_by_its_trace() -> None:
    full = torch.randn(4, 3, 4, 3).double()
    trace = torch.einsum("ncmc->nm", full) / 3
    blocks = torch.stack([full[:, c, :, c] for c in range(3)])
    for kernel in (full, blocks, trace):
        assert torch.allclose(pictures.trace_of(kernel), trace, atol=1e-15, rtol=0), kernel.shape


# ── the dashboard ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("prefix", ["", "a(b)-"])
def test_every_tag_is_on_exactly_one_chart(prefix: str) -> None:
    """As TensorBoard matches: each pattern with re.match, from the beginning of the tag."""
    m = MEASURED[5]
    patterns = [
        p for charts in layout(m, lambda tag: prefix + tag).values() for _, chart in charts.values() for p in chart
    ]
    tags = [f"{prefix}ntk/{name}" for name in m.metrics]
    tags += [
        f"{prefix}ntk_layers/{module or 'model'}/{name}" for module in m.layer_metrics for name in ("share", "angle")
    ]
    for tag in tags:
        assert len([p for p in patterns if re.match(p, tag)]) == 1, tag
    assert not [p for p in patterns if re.match(p, "train_loss")]


def test_a_chart_holds_one_unit() -> None:
    charts = layout(MEASURED[5])["NTK"]
    shared = {title: tags for title, (_, tags) in charts.items() if len(tags) > 1}
    assert all("log10" in title for title in shared)
    assert "a new diagnostic" in charts
    assert not [title for title, (_, tags) in charts.items() if not tags]


# ── callback_metrics ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_published_are_the_newest_defined_values() -> None:
    fed = feed([])
    metrics: dict[str, Any] = {"val_loss": torch.tensor(1.0)}
    publish(fed.values, metrics)
    assert metrics["val_loss"] == 1.0
    assert metrics["ntk/kernel_angle"].item() == 13 / 7
    assert metrics["ntk/taylor_ratio"].item() == 0.5
    assert all(value.ndim == 0 and value.isfinite() for value in metrics.values())
    fed.write(Measurement(21, {"kernel_angle": None}, {}, torch.eye(2), {}, torch.ones(2), 0.1))
    assert fed.values["ntk/kernel_angle"] == 13 / 7, "undefined now: the newest defined value stays"


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_and_early_stopping_can_monitor_what_is_published(pl: ModuleType, tmp_path: Path) -> None:
    class Model(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Feed(pl.Callback):  # type: ignore[name-defined, misc]
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.fed = LoggerGroup([], pytest.fail)
            self.fed.write(MEASURED[0])
            publish(self.fed.values, trainer.callback_metrics)

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 2:
                self.fed.write(MEASURED[8])
                publish(self.fed.values, trainer.callback_metrics)

    callbacks = importlib.import_module(f"{pl.__name__}.callbacks")
    saved = callbacks.ModelCheckpoint(tmp_path, monitor="ntk/kernel_angle", mode="max", save_top_k=1)
    stop = callbacks.EarlyStopping("ntk/kernel_angle", mode="max", patience=3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)), batch_size=2)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=20, callbacks=[Feed(), stop, saved], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), data, data)
    assert float(saved.best_model_score) == pytest.approx(8 / 7)
    assert 3 < trainer.current_epoch < 10, "it stops when the angle has not grown for three epochs"

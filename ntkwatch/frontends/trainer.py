"""What is read of a Lightning Trainer, and the little that is shown in it; the same for both import names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ntkwatch.guard import leave_no_trace
from ntkwatch.probes import ProbeSet, batches_of, row_format


def import_names() -> list[str]:
    """Those of Lightning's two import names that are loaded, and have a Callback."""
    return [name for name in ("lightning.pytorch", "pytorch_lightning") if hasattr(sys.modules.get(name), "Callback")]


COLUMNS = {"ntk_angle": "ntk/kernel_angle", "ntk_rho": "ntk/taylor_ratio"}  # of the progress bar
TRUE_PRECISION = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def probe_loader(trainer: Any, split: str | None) -> tuple[str, Any]:
    """("val" | "train", loader): the split asked for, else validation where there is one."""
    if split != "train":
        loader = _val_loader(trainer)
        if loader is not None:
            return "val", loader
        if split == "val":
            raise ValueError("probes='val' but the trainer has no validation loader: pass one, or probes='train'")
    return "train", trainer.train_dataloader


def _val_loader(trainer: Any) -> Any:
    """The validation loader, asked for early where Lightning has not set it up yet (and forgotten again)."""
    if trainer.val_dataloaders is not None:
        return _some(trainer.val_dataloaders)
    source = getattr(getattr(trainer.fit_loop.epoch_loop, "val_loop", None), "_data_source", None)
    if source is None or not source.is_defined() or not trainer.enable_validation:
        return None
    with leave_no_trace(trainer.lightning_module):
        return _some(source.dataloader())


def _some(loaders: Any) -> Any:
    """The loader or loaders, None for an empty list or dict; a loader of a stream has no length to ask for."""
    return None if isinstance(loaders, (list, tuple, dict)) and not loaders else loaders


def calibration(trainer: Any, batch: Any, probes: ProbeSet) -> list[Any]:
    """Of a first training batch, what BatchNorm may be calibrated on beside the probes: of several loaders, the batch
    of the first one whose batches are of the probes' form, else of the first."""
    singles = (
        [] if batch is None else [each for each in batches_of(trainer.train_dataloader, batch) if each is not None]
    )
    if len(singles) > 1:
        form = row_format(probes.batch, row_shapes=False)
        singles.sort(key=lambda each: row_format(each, row_shapes=False) != form)  # a stable sort
    return singles[:1]


class Moment(NamedTuple):
    """Where a run stands: its step, and what is recorded and logged beside it.

    x: on the loggers' axis, where Lightning puts what the module logs of a batch that starts then; None: not known.
    late: batches have been trained on since.
    """

    step: int
    global_step: int
    epoch: int
    x: int | None
    late: bool = False


def now(trainer: Any, step: int, batches: int = 0) -> Moment:
    """The present moment. batches: how many Lightning has still to count.

    On the x axis it counts batches after which an optimizer may step: with manual optimization every batch.
    """
    count = getattr(getattr(trainer.fit_loop, "epoch_loop", None), "_batches_that_stepped", None)
    x = count + batches if isinstance(count, int) else None
    return Moment(step, trainer.global_step, trainer.current_epoch, x)


@contextmanager
def true_precision(trainer: Any) -> Iterator[None]:
    """Under "64-true" and the like Lightning runs forward with another default dtype; so does a probe."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(TRUE_PRECISION.get(str(trainer.precision), before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def show_columns(trainer: Any, values: Mapping[str, float]) -> Callable[[], None]:
    """Two columns in the progress bar, through its public `get_metrics`; returns what takes them away again."""
    bar = trainer.progress_bar_callback
    if bar is None:
        return lambda: None
    inner = bar.get_metrics

    def get_metrics(*args: Any, **kwargs: Any) -> dict[str, Any]:
        shown = {column: f"{values[tag]:.3f}" for column, tag in COLUMNS.items() if tag in values}
        return {**inner(*args, **kwargs), **shown}

    bar.get_metrics = get_metrics
    return lambda: vars(bar).pop("get_metrics", None)


def hyperparameters(trainer: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the data module, the module and the callback that are numbers, strings or flags; later ones win.

    LightningCLI keeps something of its own among them, by a name with an underscore.
    """
    sources = (getattr(trainer.datamodule, "hparams", {}), getattr(trainer.lightning_module, "hparams", {}), given)
    merged = {str(key): value for source in sources for key, value in dict(source).items()}
    plain = (bool, int, float, str, type(None))
    return {k: v for k, v in merged.items() if isinstance(v, plain) and not k.startswith("_")}


def as_in_training(trainer: Any, probes: ProbeSet, seed: int) -> ProbeSet:
    """The batch as training_step would get it: after the module's transfer hooks and the precision plugin."""
    with leave_no_trace(trainer.lightning_module):
        torch.manual_seed(seed)  # a random transfer hook then does the same at every width
        batch = trainer.strategy.batch_to_device(probes.batch, dataloader_idx=0)
        return replace(probes, batch=trainer.precision_plugin.convert_input(batch))


def stays_out(trainer: Any, watch: Any) -> str | None:
    """Why a watch takes no part in a Trainer's runs; None where it does."""
    if trainer.barebones:
        return "Trainer(barebones=True) runs without extras"
    asked_for = watch.state_key == type(watch).state_key  # by the script, not by the environment
    if not asked_for and any(other is not watch and isinstance(other, type(watch)) for other in trainer.callbacks):
        return "the Trainer has an NTKWatch of its own, beside the one that the environment asks for"
    return None

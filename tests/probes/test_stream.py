"""Data that only streams: the probes are gathered as the run reads it, and K_0 is that of the weights it began with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ntkwatch import NTKWatch, empirical_ntk, load_run
from ntkwatch.metrics import kernel_angle
from ntkwatch.probes import RowCollector, from_stream
from tests.support.runs import Classifier, rows, trainer

X, Y = rows(96).tensors


class Stream(IterableDataset):
    """The rows one by one, in order, each as `form` makes it of its place."""

    def __init__(self, form: Callable[[int], Any] = lambda i: (X[i], Y[i]), n: int = 96) -> None:
        self.form, self.n = form, n

    def __iter__(self) -> Iterator[Any]:
        return map(self.form, range(self.n))


class Consumed(IterableDataset):
    """An open file or socket: whoever iterates it again gets what is left."""

    def __init__(self) -> None:
        self.left = iter(range(96))

    def __iter__(self) -> Iterator[Any]:
        return ((X[i], Y[i]) for i in self.left)


class Reads(Classifier):
    """Lays the inputs out for its net: a dict's, or the mean over a sequence."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.read: list[Tensor] = []  # what training took

    def forward(self, x: Tensor | None = None, **batch: Tensor) -> Any:
        x = batch["features"] if x is None else x
        return self.net(x.mean(1) if x.ndim == 3 else x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["features"], batch["labels"]) if isinstance(batch, dict) else batch
        self.read.append(x.clone())
        return nn.functional.cross_entropy(self(x), y)


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Its BatchNorm, if any, has seen data already, so that the statistics of the baseline are those it has."""
    model.train()
    with torch.no_grad():
        model.net(torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)))
    return model


def as_dict(i: int) -> dict[str, Tensor]:
    return {"features": X[i], "labels": Y[i]}


def padded(i: int) -> tuple[Tensor, Tensor]:
    return X[i].expand(2 + i % 3, 6), Y[i]


CASES: dict[str, dict[str, Any]] = {  # want: how many probes of the first rows, 64 asked for
    "one by one": {"batch": 1, "want": 64},
    "pairs": {"batch": 2, "want": 64},
    "threes": {"batch": 3, "want": 64},
    "as many as are asked for": {"batch": 64, "want": 64},
    "one by one, a step for 64 of them": {"batch": 1, "want": 64, "accumulate_grad_batches": 64},
    "a short last batch": {"batch": 7, "want": 50, "stream": Stream(n=50)},
    "dicts": {"batch": 5, "want": 64, "stream": Stream(as_dict)},
    "BatchNorm": {"batch": 2, "want": 64, "norm": True},
    "BatchNorm, accumulated": {"batch": 2, "want": 64, "norm": True, "accumulate_grad_batches": 32},
    "a file that is read once": {"batch": 1, "want": 64, "stream": Consumed},
    "training ends before": {"batch": 1, "want": 20, "max_steps": 20},
    "an epoch ends before": {"batch": 1, "want": 12, "limit_train_batches": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_kernel_is_that_of_the_first_step_on_the_first_rows(case: str, tmp_path: Path) -> None:
    settings = dict(CASES[case])
    batch, want, norm = settings.pop("batch"), settings.pop("want"), settings.pop("norm", False)
    stream = settings.pop("stream", Stream)

    def fit(*callbacks: Any) -> tuple[Reads, list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = settle(Reads(norm=norm))
        data = stream() if isinstance(stream, type) else stream
        run = trainer(tmp_path, *callbacks, **{"max_steps": -1, "max_epochs": 2, **settings})
        run.fit(model, DataLoader(data, batch))
        return model, model.read, torch.get_rng_state()

    torch.manual_seed(0)
    start = settle(Reads(norm=norm))
    watch = NTKWatch(every=[0, 3], budget=None, on_error="raise")
    (plain, read, state), (model, read_too, state_too) = fit(), fit(watch)

    run = load_run(watch.record)
    assert run.steps[0] == 0, case
    assert run.manifest["probes"]["n"] == want, f"{case}: {run.manifest['probes']['how']}"
    expected = empirical_ntk(start, torch.cat(read)[:want])
    torch.testing.assert_close(run.kernel(0), expected, rtol=1e-9, atol=1e-9, msg=case)
    assert watch.last.step > 0, case
    assert watch.last.metrics["kernel_angle"] > 1e-3, f"{case}: the weights have moved, and so has the kernel"
    here = empirical_ntk(model, torch.cat(read)[:want]) if not norm else None
    if here is not None:
        angle = float(kernel_angle(here, expected))
        assert watch.last.metrics["kernel_angle"] == pytest.approx(angle, rel=1e-6), case

    assert torch.equal(state, state_too), f"{case}: the run's random numbers"
    assert [x.tolist() for x in read] == [x.tolist() for x in read_too], f"{case}: the run's data"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), f"{case}: {name} was trained otherwise"


def test_rows_of_many_lengths_are_gathered_apart(tmp_path: Path) -> None:
    watch = NTKWatch(every=[0], budget=None, on_error="raise")
    trainer(tmp_path, watch, max_steps=80).fit(Reads(), DataLoader(Stream(padded), 1))
    probes = load_run(watch.record).manifest["probes"]
    assert probes["n"] == 22, "of 64 batches in three lengths"
    assert (
        "22 rows of the train stream (64 were asked for) that fit together, of 64 batches in 3 shapes" in probes["how"]
    )


def test_a_few_probes_are_a_warning_whose_remedy_works(tmp_path: Path) -> None:
    dataset = Stream()
    with pytest.warns(UserWarning, match=r"only 5 probes.*small kernels.*pass a batch") as said:
        trainer(tmp_path / "few", NTKWatch(budget=None), max_steps=5).fit(Classifier(), DataLoader(dataset, 1))
    (message,) = [str(w.message) for w in said if "probes" in str(w.message)]
    scope = {"NTKWatch": NTKWatch, "DataLoader": DataLoader, "dataset": dataset}
    watch = eval(message.partition(", as ")[2], scope)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NTKWatch: (?!one probe)")
        trainer(tmp_path / "many", watch, max_steps=5).fit(Classifier(), DataLoader(dataset, 1))
    assert load_run(watch.record).manifest["probes"]["n"] == 64


@pytest.mark.parametrize(
    ("data", "settings", "warns"),
    [
        (lambda: DataLoader(Stream(), 1), {"probes": 4}, False),  # as many as were asked for
        (lambda: DataLoader(Stream(), 8), {"probes": 8}, False),
        (lambda: DataLoader(Stream(n=7), 1), {}, True),
        (lambda: DataLoader(rows(7), 1), {}, True),  # no stream, and as few
        (lambda: DataLoader(rows(8), 1), {}, False),
        (lambda: DataLoader(rows(96), 1), {"probes": X[:4]}, False),  # given
    ],
    ids=["4 asked for", "8 of a batch", "7 stream", "7 examples", "8 examples", "4 given"],
)
def test_fewer_than_eight_are_warned_of(data: Any, settings: Any, warns: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, NTKWatch(**settings, budget=None), max_steps=9).fit(Classifier(), data())
    assert any("only 7 probes" in str(w.message) for w in said) is warns


def test_a_model_too_large_to_be_kept_is_compared_with_what_it_is_when_there_are_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.measurement.initial_state.THETA_0_LIMIT", 0)
    watch = NTKWatch(every=1, budget=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NTKWatch: (?!one probe)")
        trainer(tmp_path / "a", watch, max_steps=12).fit(Classifier(), DataLoader(Stream(), 1))
    run = load_run(watch.record)
    assert run.manifest["probes"]["n"] == 8
    assert run.steps == [7, 8, 9, 10, 11, 12], "the eighth row comes before the eighth step"
    watch = NTKWatch(every=1, budget=None)
    trainer(tmp_path / "b", watch, max_steps=2, accumulate_grad_batches=8).fit(Classifier(), DataLoader(Stream(), 1))
    assert load_run(watch.record).steps == [0, 1, 2], "no step comes before the eighth row"


def test_frozen_and_unfrozen_weights_are_those_of_the_start(tmp_path: Path) -> None:
    class Unfreezes(Reads):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 10:
                self.net[0].requires_grad_(True)

    torch.manual_seed(0)
    model = Unfreezes()
    model.net[0].requires_grad_(False)
    start = copy.deepcopy(model)
    watch = NTKWatch(probes=16, every=[0], budget=None)
    with pytest.warns(UserWarning, match="2 parameters train now that did not"):
        trainer(tmp_path, watch, max_steps=20).fit(model, DataLoader(Stream(), 1))
    torch.testing.assert_close(load_run(watch.record).kernel(0), empirical_ntk(start, X[:16]), rtol=1e-9, atol=1e-9)
    assert model.net[0].weight.requires_grad


def test_a_resumed_stream_of_single_rows_keeps_its_probes(tmp_path: Path) -> None:
    def fit(watch: NTKWatch, steps: int, checkpoint: Path | None = None) -> Any:
        run = trainer(tmp_path / str(steps), watch, max_steps=steps)
        run.fit(Classifier(), DataLoader(Stream(), 1), ckpt_path=checkpoint)
        return run

    half, rest = (NTKWatch(probes=12, budget=None, every=5) for _ in range(2))
    fit(half, 20).save_checkpoint(tmp_path / "half.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="NTKWatch: (?!one probe)")
        fit(rest, 30, tmp_path / "half.ckpt")
    assert rest.record == half.record
    assert load_run(rest.record).steps == [0, 12, 15, 20, 25, 30], "5 and 10 wait for the probes"


def test_a_trial_run_does_not_wait(tmp_path: Path) -> None:
    watch = NTKWatch()
    trainer(tmp_path, watch, max_steps=-1, fast_dev_run=2).fit(Classifier(), DataLoader(Stream(), 1))
    assert watch.last.step == 0
    assert watch.record is None


class Shifts(Classifier):
    """Moves its batches on their way: rows that training has read are moved already."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


def test_rows_of_a_stream_pass_the_transfer_hooks_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shifts()
    expected = empirical_ntk(model, X[:16] + 1)
    watch = NTKWatch(probes=16, every=[0], budget=None)
    trainer(tmp_path, watch).fit(model, DataLoader(Stream(), 4))
    torch.testing.assert_close(load_run(watch.record).kernel(0), expected, rtol=1e-9, atol=1e-9)


def test_of_a_streaming_validation_set_and_training_rows_that_can_be_chosen_these_are_taken(tmp_path: Path) -> None:
    watch = NTKWatch(budget=None)
    trainer(tmp_path, watch).fit(Classifier(), DataLoader(rows(96), 1), DataLoader(Stream(), 1))
    probes = load_run(watch.record).manifest["probes"]
    assert (probes["n"], probes["source"]) == (64, "train")
    assert "balanced over 3 classes" in probes["how"]


def test_the_forecast_says_why_it_is_not_there(tmp_path: Path) -> None:
    watch = NTKWatch(budget=None, diagnostics=["default", "loss_if_lazy"], loss=nn.functional.cross_entropy, every=[0])
    with pytest.warns(UserWarning, match="no linear forecast.*every batch since the baseline.*pass a batch as probes="):
        trainer(tmp_path, watch, max_steps=70).fit(Classifier(), DataLoader(Stream(), 1))
    assert watch.last.metrics["loss_if_lazy"] is None


# ── what is gathered ──────────────────────────────────────────────────────────────────────────────────────────────────
def shared(i: int, mask: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full((2, 3), float(i)), torch.full((5,), mask)


BATCHES: dict[str, tuple[list[Any], int, int]] = {  # batches, n, rows that become probes
    "rows beyond n": ([torch.ones(5, 2)] * 3, 12, 12),
    "another type": ([torch.ones(5, 2), torch.ones(5, 2, dtype=torch.float64)], 8, 5),
    "other keys": ([{"a": torch.ones(2, 2)}, {"b": torch.ones(3, 2)}], 8, 3),
    "the larger group": ([torch.ones(2, 4), torch.ones(2, 5), torch.ones(2, 5)], 8, 4),
    "what all share": ([shared(0), shared(1)], 8, 4),
    "shared, but different": ([shared(0, 1.0), shared(1, 2.0)], 8, 2),
    "no rows": ([torch.ones(0, 2), torch.ones(3, 2)], 8, 3),
    "names beside": ([{"x": torch.ones(2, 2), "id": ["a", "b"]}, {"x": torch.ones(1, 2), "id": ["c"]}], 8, 3),
}


@pytest.mark.parametrize("case", BATCHES)
def test_what_fits_together(case: str) -> None:
    batches, n, wanted = BATCHES[case]
    probes = from_stream([*batches], n, targets=lambda batch: torch.arange(wanted))
    assert len(probes) == wanted, case
    if case == "names beside":
        assert probes.batch["id"] == ["a", "b", "c"]


def test_waiting_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(lengths: Iterator[int], n: int) -> RowCollector:
        gathered = RowCollector(n)
        while not gathered.complete:
            gathered.add(torch.ones(1, next(lengths)))
        return gathered

    assert read(iter([2] * 100), 16).batches == 16
    assert read(iter([2, 3] * 100), 16).batches == 16, (
        "eight of a length are enough where as many batches as probes came"
    )
    assert read(iter([2, 3, 4, 5] * 100), 16).batches == 29, "… and are waited for where they have not"
    assert read(iter(range(1, 1000)), 16).batches == 8 * 16, "no length comes twice"
    monkeypatch.setattr("ntkwatch.probes.stream.MAX_BYTES", 100)
    assert read(iter([10] * 100), 16).batches == 3, "rows of 40 bytes"


def test_rows_are_copies() -> None:
    batch = torch.ones(4, 2)
    gathered = RowCollector(4)
    gathered.add(batch)
    batch.zero_()
    assert gathered.probes(targets=lambda b: torch.arange(4)).batch.sum() == 8

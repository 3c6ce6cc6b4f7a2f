"""Probes that do not fit the model: every way in says which module they reached, what it takes, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ntkwatch import Monitor, UnsupportedModel, empirical_ntk, layer_ntks, plan
from ntkwatch.measurement.arguments import count_outputs
from ntkwatch.model import Network
from ntkwatch.model.errors import describe_mismatch
from tests.support.cases import CASES, build

N = 5


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def _cnn(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def _words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))


class Head(nn.Module):
    """A recurrent, attending or normalising layer under a name of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)
        layers = {"lstm": nn.LSTM(4, 4, batch_first=True), "norm": nn.LayerNorm(4)}
        self.body = layers.get(kind) or nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x) if self.kind != "attention" else self.body(x, x, x)
        return self.head((h if isinstance(h, Tensor) else h[0])[:, -1])


# model, probes, the module, what it takes, what it got, the remedy
MISFITS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[str, str, str, str]]] = {
    "float64": (_mlp, lambda: torch.randn(N, 12).double(), ("0 (Linear)", "float32", "float64", "model.to(torch.fl")),
    "half": (_mlp, lambda: torch.randn(N, 12).half(), ("0 (Linear)", "float32", "float16", "probes.to(torch.float32")),
    "bytes": (_cnn, lambda: torch.ones(N, 3, 8, 8).byte(), ("0 (Conv2d)", "float32", "uint8", "probes.to(")),
    "whole numbers": (_mlp, lambda: torch.ones(N, 12).long(), ("0 (Linear)", "float32", "int64", "probes.to(")),
    "width": (_mlp, lambda: torch.randn(N, 13), ("0 (Linear)", "a last dimension of 12", "[5, 13]", "transform")),
    "images": (_mlp, lambda: torch.randn(N, 3, 2, 2), ("0 (Linear)", "dimension of 12", "[5, 3, 2, 2]", "flatten(1)")),
    "channels": (_cnn, lambda: torch.randn(N, 2, 8, 8), ("0 (Conv2d)", "[n, 3, size, size]", "[5, 2, 8, 8]", "transf")),
    "channels last": (_cnn, lambda: torch.randn(N, 8, 8, 3), ("0 (Conv2d)", "[n, 3,", "8, 3]", "permute(0, 3, 1, 2)")),
    "no channel": (lambda: _cnn(1), lambda: torch.randn(N, 8, 8), ("0 (Conv2d)", "[n, 1,", "[5, 8, 8]", "unsqueeze")),
    "float tokens": (_words, lambda: torch.randn(N, 2), ("0 (Embedding)", "numbers from 0 to 8", "float32", "long()")),
    "unknown tokens": (_words, lambda: torch.full((N, 2), 9), ("0 (Embedding)", "from 0 to 8", "9 to 9", "tokenizer")),
    "lstm": (lambda: Head("lstm"), lambda: torch.randn(N, 6, 5), ("body (LSTM)", "of 4", "[5, 6, 5]", "transform")),
    "norm": (lambda: Head("norm"), lambda: torch.randn(N, 6, 5), ("body (LayerNorm)", "of 4", "[5, 6, 5]", "transf")),
    "attention": (lambda: Head("attention"), lambda: torch.randn(N, 6, 5), ("body (Mu", "of 4", "[5, 6, 5]", "trans")),
}  # fmt: skip

WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "empirical_ntk": empirical_ntk,
    "layer_ntks": layer_ntks,
    "empirical_ntk, functional": lambda model, x: empirical_ntk(model, x, engine="functional"),
    "plan": plan,
    "plan with diagnostics": lambda model, x: plan(model, x, diagnostics="default"),
    "Monitor": lambda model, x: Monitor(model, x),
    "Monitor with targets": lambda model, x: Monitor(model, (x, torch.arange(N) % 3)),
    "one probe": lambda model, x: empirical_ntk(model, x[:1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_got_do_this(way: str) -> None:
    for case, (make, probes, (place, takes, got, remedy)) in MISFITS.items():
        if (case, way) == ("no channel", "one probe"):
            continue  # torch takes [1, 8, 8] for a single image
        with pytest.raises(ValueError, match="the probes do not fit the model") as caught:
            WAYS[way](make(), probes())
        said = str(caught.value)
        expected = got.replace("[5, ", "[1, ") if way == "one probe" else got
        remedy = remedy.replace("probes.", "probes[0].") if way == "Monitor with targets" else remedy
        for part in (f"module {place}", takes, expected, remedy, "outputs="):
            assert part in said, f"{case}, {way}: no {part!r} in {said!r}"
        assert "\n" not in said, case


def test_the_second_batch_is_told_from_the_first() -> None:
    with pytest.raises(ValueError, match=r"takes a last dimension of 12, got \[4, 11\]"):
        empirical_ntk(_mlp(), torch.randn(N, 12), torch.randn(4, 11))


def test_a_layer_that_the_probes_do_not_reach_is_named_as_such() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(7, 3))
    with pytest.raises(ValueError, match=r"module 2 \(Linear\) takes a last dimension of 7 and gets \[\d, 8\] from"):
        empirical_ntk(model, torch.randn(N, 12))


class Own(nn.Module):
    """A module that casts for itself, and fails for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such page")


class Across(nn.Module):
    """Convolves over the batch: four examples are its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Conv2d(4, 4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x.transpose(0, 1)).transpose(0, 1).mean((2, 3)))


def test_a_model_of_one_size_of_batch_is_no_misfit() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"these 4 probes together but not on some of them \(.*\): where batches"
    ):
        empirical_ntk(Across(), torch.randn(4, 3, 9, 9))


def test_probes_of_inference_mode_are_told() -> None:
    with torch.inference_mode():
        x = torch.randn(N, 12)
    with pytest.raises(ValueError, match=r"inference_mode.*probes\.clone\(\)"):
        empirical_ntk(_mlp(), x)
    empirical_ntk(_mlp(), x.clone())


def test_other_errors_stay_what_they_are() -> None:
    """A failure that is not the probes' fault is not put down to them."""
    for model, x in ((Own(), torch.ones(N, 4).long()), (nn.Sequential(Own()), torch.randn(N, 4))):
        with pytest.raises(RuntimeError, match="no such page"):
            empirical_ntk(model, x)
        with pytest.raises(ValueError, match=r"the model failed on the probes \(RuntimeError: no such page\)"):
            count_outputs(Network(model), x, "trace")
    assert describe_mismatch(_mlp(), torch.randn(N, 12), RuntimeError("never raised")) is None


class Large(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_memory_that_runs_out_is_no_misfit() -> None:
    with pytest.raises(MemoryError, match=r"one forward pass of the probes \(OutOfMemoryError.*fewer probes"):
        count_outputs(Network(Large(12, 3)), torch.randn(N, 12), "trace")


def test_whatever_fits_is_not_called_a_misfit() -> None:
    """Every module of the zoo, made to fail in its last step with the right probes."""
    for case in [c for c in CASES if not c.refused and not c.heavy][:40]:
        module, batch = build(case)
        handle = module.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="at the end") as caught:
            Network(module).outputs(batch)
        handle.remove()
        assert describe_mismatch(module, batch, caught.value) is None, (
            f"{case}: {describe_mismatch(module, batch, caught.value)}"
        )


def _fail(*_: Any) -> None:
    raise RuntimeError("at the end")


@dataclass
class Fields:
    x: Tensor
    y: Tensor | None = None


# probes, the model, what is said
OTHER_FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], tuple[str, ...]]] = {
    "a mapping": (
        _mlp,
        lambda: {"x": torch.randn(N, 12), "z": torch.ones(N)},
        ("do not fit", "0 (Linear)", "a dict of x, z", "probes['x']", "outputs=lambda model, batch: model(batch['x'])"),
    ),
    "a list in a list": (_mlp, lambda: [[[torch.randn(N, 12)]]], ("0 (Linear)", "a list of 1", "probes[0]")),
    "a dataclass": (
        _mlp,
        lambda: Fields(torch.randn(N, 12)),
        ("do not fit", "0 (Linear)", "a Fields of x, y", "pass outputs=lambda model, batch: model(batch.x)"),
    ),
    "one example": (_mlp, lambda: torch.randn(12), ("takes a last dimension of 12, got [12]", "probes.unsqueeze(0)")),
    "no column": (lambda: nn.Linear(1, 2), lambda: torch.randn(N), ("dimension of 1, got [5]", "probes.unsqueeze(1)")),
    "no dimensions": (_mlp, lambda: torch.tensor(1.0), ("a batch must hold a tensor", "got a tensor of no dimensions")),
    "all rows are told": (_mlp, lambda: torch.randn(50, 13), ("takes a last dimension of 12, got [50, 13]",)),
    "all tokens are told": (_words, lambda: torch.arange(40).reshape(20, 2), ("0 to 8, got 0 to 39",)),
    "no numbers": (_mlp, lambda: torch.randn(N, 12, device="meta"), ("meta device", "give them on the model's own")),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_other_forms_are_told(case: str) -> None:
    make, probes, parts = OTHER_FORMS[case]
    with pytest.raises(ValueError, match=r"probes|batch") as caught:
        empirical_ntk(make(), probes())
    for part in parts:
        assert part in str(caught.value), f"{case}: no {part!r} in {str(caught.value)!r}"


class Rows(IterableDataset):
    """Gives its examples in turn alone."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.randn(N, 12)


class Plain:
    """A dataset that is no torch Dataset, as Hugging Face's are not."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(12)


def _pairs() -> TensorDataset:
    return TensorDataset(torch.randn(N, 12), torch.zeros(N))


def _nested(layout: torch.layout) -> Tensor:
    """N examples of unlike lengths."""
    return torch.nested.nested_tensor([torch.randn(1 + i, 12) for i in range(N)], layout=layout)


TAKE_A_BATCH = "take a batch of it, next("
NESTED = ("the probes are a nested tensor", "torch.nested.to_padded_tensor(probes, 0.0)", "mask")
DENSE = ("must be dense", "give probes.to_dense()", "outputs=lambda model, batch: …")
NO_BATCHES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {  # what is given for a batch, what is said
    "a loader": (lambda: DataLoader(_pairs(), 2), ("got DataLoader (loader)", f"{TAKE_A_BATCH}iter(loader))")),
    "a loader and targets": (lambda: (DataLoader(_pairs(), 2), torch.zeros(2)), ("(loader)", TAKE_A_BATCH)),
    "a dataset": (_pairs, ("got TensorDataset (dataset)", f"{TAKE_A_BATCH}iter(DataLoader(dataset,")),
    "a part of a dataset": (lambda: Subset(_pairs(), [0, 1]), ("got Subset (", TAKE_A_BATCH)),
    "a dataset that streams": (Rows, ("got Rows (dataset)", TAKE_A_BATCH)),
    "a dataset of one's own": (Plain, ("got Plain (dataset)", TAKE_A_BATCH)),
    "a loader's iterator": (lambda: iter(DataLoader(_pairs(), 2)), ("(iterator)", f"{TAKE_A_BATCH}iterator)")),
    "a generator": (lambda: (x for x in torch.randn(2, N, 12)), ("got generator (iterator)", TAKE_A_BATCH)),
    "text": (lambda: "val", ("must hold a tensor [n, ...], got str", "pass tensors")),
    "texts": (lambda: ["a", "b"], ("must hold a tensor [n, ...]", "pass tensors")),
    "no numbers": (lambda: torch.randn(N, 12, device="meta"), ("meta device", "give them on the model's own")),
    **{
        layout: (lambda make=make: make(torch.eye(12)[:N]), (*DENSE, f"got [5, 12] in the layout {layout}:"))
        for layout, make in (
            ("sparse_coo", Tensor.to_sparse),
            ("sparse_csr", Tensor.to_sparse_csr),
            ("sparse_csc", Tensor.to_sparse_csc),
            ("sparse_bsr", lambda x: x.to_sparse_bsr((1, 2))),
            ("_mkldnn", Tensor.to_mkldnn),
        )
    },
    "nested, jagged": (lambda: _nested(torch.jagged), NESTED),
    "nested, strided": (lambda: _nested(torch.strided), NESTED),
    "nested beside targets": (lambda: (_nested(torch.jagged), torch.zeros(N)), NESTED),
    "nested under a name": (lambda: {"x": _nested(torch.jagged), "y": torch.zeros(N)}, NESTED),
    "sparse beside targets": (lambda: (torch.eye(12)[:N].to_sparse(), torch.zeros(N)), DENSE),
    "sparse under a name": (lambda: {"x": torch.eye(12)[:N].to_sparse(), "y": torch.zeros(N)}, DENSE),
}
ASK: dict[str, Callable[[nn.Module, Any], Any]] = {
    "empirical_ntk": empirical_ntk,
    "its x2": lambda model, x: empirical_ntk(model, torch.randn(N, 12), x),
    "layer_ntks": layer_ntks,
    "plan": plan,
    "Monitor": Monitor,
}


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("case", NO_BATCHES)
def test_what_is_no_batch_is_told(case: str) -> None:
    """By whatever is asked: the kind of thing that it is, and how a batch is had of it."""
    make, parts = NO_BATCHES[case]
    for name, ask in ASK.items():
        with pytest.raises(ValueError, match=r"probes|batch") as caught:
            ask(_mlp(), make())
        for part in parts:
            assert part in str(caught.value), f"{name}, {case}: no {part!r} in {str(caught.value)!r}"


class Graph(nn.Module):
    """Mixes outputs by a sparse matrix that all examples share, and passes over texts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _mlp()

    def forward(self, texts: list[str], x: Tensor, mixing: Tensor) -> Tensor:
        return self.body(x) @ mixing.to_dense().t()


def test_texts_and_what_all_examples_share_may_be_anything() -> None:
    """The negative control: what is refused as probes is taken where it is none."""
    model, x, texts = Graph(), torch.randn(N, 12), list("abcde")
    mixing = torch.rand(7, 3)
    want = empirical_ntk(model.body, x, outputs=lambda body, x: body(x) @ mixing.t())
    got = empirical_ntk(model, (texts, x, mixing.to_sparse(), torch.zeros(N)))
    assert torch.allclose(got, want, rtol=1e-5)


class Named(nn.Module):
    """Takes its input by name, and a batch of other names as nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words = _words()

    def forward(self, tokens: Tensor | None = None, **_: Any) -> Tensor:
        return self.words(tokens)


def test_a_name_that_the_model_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"words.0 \(Embedding\) takes a tensor and gets None .* ids int64 \[5, 2\]"):
        empirical_ntk(Named(), {"ids": torch.ones(N, 2).long()})


def test_only_types_that_models_train_in_are_recommended() -> None:
    with pytest.raises(ValueError, match=r"probes\.to") as caught:
        empirical_ntk(_mlp(), torch.randn(N, 12).to(torch.float8_e4m3fn))
    assert "model.to" not in str(caught.value)


class Masked(nn.Module):
    """Holds −∞ in a buffer, as masks do, and overflows where asked to."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.body, self.scale = _mlp(), scale
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) * self.scale).exp()


def test_whose_numbers_are_not_finite() -> None:
    """The probes are blamed for their own NaN alone, and every reason is given once."""
    spoilt, x, nan = Masked(1.0), torch.randn(N, 12), torch.full((N, 12), float("nan"))
    with torch.no_grad():
        spoilt.body[2].bias[0] = float("nan")
    cases: dict[str, tuple[nn.Module, Tensor, str]] = {
        "weights": (spoilt, x, "the model's own body.2.bias holds NaN"),
        "both": (spoilt, nan, "the model's own body.2.bias holds NaN"),
        "probes": (Masked(1.0), nan, "the probes hold NaN"),
        "overflow": (Masked(1e4), x, "weights and probes hold none"),
    }
    for case, (model, probes, part) in cases.items():
        with pytest.raises(UnsupportedModel, match="NaN") as caught:
            empirical_ntk(model, probes)
        assert part in str(caught.value), f"{case}: {caught.value}"
        assert "and torch.func" not in str(caught.value), f"{case}: {caught.value}"

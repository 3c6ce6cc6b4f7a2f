"""The benchmark's page says what was measured: ratios follow from seconds, failures are shown, exponents are fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntkwatch.engines import extrapolation
from tests.bench import comparison, forecast, seconds, timing
from tests.bench.comparison import SINGLE, compare
from tests.bench.engines import Ours, float64_kernel
from tests.bench.growth import exponent
from tests.bench.models import QUICK, mlp
from tests.bench.peers import PEERS, Peer
from tests.bench.run import main
from tests.bench.timing import OUT_OF_MEMORY, Timer, measure, relative_error
from tests.support.clocks import ticking

CPU = torch.device("cpu")
Table = list[dict[str, str]]


def tables(page: str) -> dict[str, Table]:
    """{heading: rows} of a Markdown page."""
    found = {}
    for part in page.split("\n## ")[1:]:
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
        found[part.splitlines()[0]] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    return found


def test_quick_page(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.md"
    assert main(["--quick", "--output", str(path)]) == 0
    page = path.read_text()
    assert page.strip() in capsys.readouterr().out, "the terminal and the file differ"
    found = tables(page)
    seconds, ratios = found["Seconds"], found["Ratios"]
    assert [(r["model"], r["kernel"]) for r in seconds] == [(m, q) for m in QUICK for q in ("trace", "full")]
    for row, ratio in zip(seconds, ratios, strict=True):
        case = f"{row['model']} {row['kernel']}"
        for peer in PEERS:
            assert (row[peer.name] == "not installed") == (peer.version() is None), f"{case}: {peer.name}"
        for shown, (above, below) in {
            "single / floor": ("single", "floor"), "double / single": ("double", "single"),
            "tutorial / single": ("tutorial", "single"),
        }.items():  # fmt: skip
            quotient = float(row[above].split()[0]) / float(row[below].split()[0])
            assert float(ratio[shown].split("×")[0]) == pytest.approx(quotient, rel=0.02), f"{case}: {shown}"
        gpu = row["single on GPU"]
        assert (gpu == "unmeasured") == (not torch.cuda.is_available()), f"{case}: GPU column {gpu}"
    for row in found["Agreement with float64"]:
        assert all(float(row[k]) < 1e-3 for k in ("single", "double", "tutorial")), row
    for row in found["Memory"]:
        assert float(row["peak"]) > 0, row
        assert float(row["predicted seconds"].split()[0]) > 0, row
    assert [r["over"] for r in found["Growth"]] == ["width"]


@pytest.mark.parametrize("peer", [p for p in PEERS if p.version() is not None], ids=lambda p: p.name)
@pytest.mark.parametrize("quantity", ["trace", "full"])
def test_peers_compute_the_kernel(peer: Peer, quantity: str) -> None:
    for name, (make, data) in QUICK.items():
        torch.manual_seed(0)
        module, x = make().eval(), data()
        kernel = getattr(peer, quantity)(module, x)
        error = relative_error(kernel, float64_kernel(module, x, quantity))  # type: ignore[arg-type]
        assert error < 1e-4, f"{peer.name} on {name} {quantity}: {error:.1e}"


def failing(error: Exception) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        raise error

    return run


def right(module: nn.Module, x: Tensor) -> Tensor:
    return float64_kernel(module, x, "trace").float()


FAILURES = {
    "no memory": (failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")), OUT_OF_MEMORY),
    "refuses": (failing(NotImplementedError("LSTM")), "refused: NotImplementedError: LSTM"),
    "doubles": (lambda m, x: 2 * right(m, x), "wrong: relative error 1.0e+00"),
    "right": (right, ""),
    "absent": (right, "not installed"),
}


def test_failures_are_shown_and_not_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = [
        Peer(name, "no-such-distribution" if name == "absent" else None, run, run)
        for name, (run, _) in FAILURES.items()
    ]
    monkeypatch.setattr(comparison, "PEERS", peers)
    monkeypatch.setitem(comparison.ASKED, ("case", "trace"), comparison.Asked())
    (cell,) = compare("case", (lambda: mlp(16, 1), lambda: torch.randn(4, 784)), Timer(1, 1.0, CPU))
    for name, (_, note) in FAILURES.items():
        assert cell.outcomes[name].note == note, name
        assert (cell.times(name) is None) == bool(note), f"{name}: a ratio for what has no figure"
    assert cell.fastest_peer() == "right"
    assert cell.outcomes[SINGLE].error is not None
    assert cell.outcomes[SINGLE].error < 1e-5


def test_the_cost_of_the_forecast_is_printed_as_a_ratio() -> None:
    header, *rows = forecast.main(["--quick", "--rounds", "1"]).splitlines()
    assert header.split()[-1] == "ratio"
    assert len(rows) == len(QUICK)
    for row in rows:
        run, _, lazy, _, ratio = row.split()[-5:]
        assert float(ratio) == pytest.approx(float(lazy) / float(run), rel=0.3), row


def test_seconds_foretold_are_printed_over_those_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    found: list[seconds.Compared] = []
    real = seconds.table

    def kept(*given: Any) -> list[seconds.Compared]:
        found.extend(real(*given))
        return found

    monkeypatch.setattr(seconds, "table", kept)
    summary = seconds.main(["--threads", "1", "--rounds", "1", "--only", "svd"])
    assert [(each.name, each.reduction) for each in found] == [("svd", "trace"), ("svd", "full")]
    for each in found:
        assert each.planned > 0 < each.taken, each
        assert each.ratio == each.planned / each.taken, each
    assert summary.startswith(f"2 kernels: {min(e.ratio for e in found):.2f} to {max(e.ratio for e in found):.2f}")
    assert seconds.said([seconds.Compared("a", "trace", 1, 1), seconds.Compared("b", "full", 5, 2)]) == (
        "2 kernels: 1.00 to 2.50, median 1.58; 1 within 1.5×, 1 within 2×, 2 within 3×"
    )


def test_slow_work_is_called_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, now = {"slow": 0, "fast": 0, "always": 0}, [0.0]
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls[name] += 1
            now[0] += seconds

        return run

    slow = {"slow": work("slow", 0.2), "fast": work("fast", 0.0), "always": work("always", 0.2)}
    found = measure(slow, {}, Timer(3, 0.1, CPU), ["always"])
    assert calls == {"slow": 1, "fast": 4, "always": 4}, "a first call, then the rounds that patience allows"
    assert {name: found[name].rounds for name in calls} == {"slow": 1, "fast": 3, "always": 3}
    assert found["slow"].seconds == pytest.approx(0.2)


def test_exponent_of_a_power_law() -> None:
    x = [16, 64, 100, 512]
    for power in (0.0, 1.0, 1.5, 2.0):
        assert exponent(x, [3 * v**power for v in x]) == pytest.approx(power, abs=1e-12), power


def test_the_plan_of_the_benchmark_is_the_public_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntkwatch import plan

    torch.manual_seed(0)
    module, x = mlp(32, 2).eval(), torch.randn(6, 784)
    rows = []
    for planned in (
        lambda: Ours(module, x).plan("full", "single"),
        lambda: plan(module, x, reduction="full", precision="single"),
    ):
        monkeypatch.setattr(extrapolation, "clock", ticking(2.0**-20))  # what is timed is never twice the same
        rows.append(planned().rows())
    mine, public = rows
    assert mine == public

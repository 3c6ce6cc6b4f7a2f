"""The benchmark's Markdown page."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from tests.bench.comparison import (
    CALL,
    DOUBLE,
    FLOOR,
    NEURAL_TANGENTS,
    SINGLE,
    Cell,
)
from tests.bench.growth import LARGE, Growth
from tests.bench.peers import PEERS
from tests.bench.timing import Outcome, Timer

MISSED = "**missed**"
GIGABYTE = 10**9


def page(
    cells: Sequence[Cell], growths: Sequence[Growth], large: dict[str, int], command: str, timer: Timer, load: str
) -> str:
    """All tables; `command` is what made them, `load` what else the machine did."""
    parts = [_head(command, timer, load)]
    if cells:
        parts += [_speed(cells), _ratios(cells), _notes(cells), _memory(cells, large), _agreement(cells)]
    if growths:
        parts += [_growth(growths), _points(growths)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(command: str, timer: Timer, load: str) -> str:
    peers = ", ".join(f"{p.distribution} {v}" for p in PEERS if p.distribution and (v := p.version()))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, so its column says unmeasured"
    return f"""# Benchmark

Exact empirical kernels of float32 models with random weights, in evaluation mode, C = 10. Made by `{command}`.

- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC
- machine: {_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()} \
cores, {torch.get_num_threads()} threads; load average before the run {load}
- GPU: {gpu}
- torch {torch.__version__}, Python {platform.python_version()}; {peers or "no other library installed"}
- everything of one model is timed in turn, round by round, in one process ({timer.clock} time): medians of \
{timer.rounds} rounds after a first call. A slow one is timed in fewer rounds, which stand in brackets; (1) may be the \
first call itself.
- *single* takes Gram products in float32, as the others do; *double*, the default, in float64.
- *floor*: one forward and C backward passes to every layer's output, of which nothing is contracted.
- *whole call*: `empirical_ntk(model, x)` in single precision with its guard, choice of engine and self-check, which a \
monitor pays once in a run."""


def _processor() -> str:
    with suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], text: str = "") -> str:
    lines = [f"## {title}", ""] + ([text, ""] if text else [])
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _seconds(outcome: Outcome | None, rounds: int) -> str:
    """Seconds, with the rounds where there were fewer; else why there are none."""
    if outcome is None:
        return "–"
    if outcome.seconds is None or outcome.note:
        return outcome.note.split(":")[0]
    return _number(outcome.seconds) + (f" ({outcome.rounds})" if outcome.rounds < rounds else "")


def _others(cells: Sequence[Cell]) -> list[str]:
    return [p.name for p in PEERS] + [NEURAL_TANGENTS] * any(NEURAL_TANGENTS in c.outcomes for c in cells)


def _speed(cells: Sequence[Cell]) -> str:
    names = [FLOOR, SINGLE, DOUBLE, CALL, *_others(cells)]
    rows = []
    for cell in cells:
        rounds = cell.outcomes[SINGLE].rounds
        times = [_seconds(cell.outcomes.get(name), rounds) for name in names]
        rows.append([cell.model, cell.quantity, *times, "unmeasured" if cell.gpu is None else _number(cell.gpu)])
    return _table("Seconds", ["model", "kernel", *names, "single on GPU"], rows)


def _judged(value: float | None, bound: float | None, least: bool, absent: str = "–") -> str:
    """A ratio with what was asked of it."""
    if value is None:
        return absent
    if bound is None:
        return f"{_number(value)}×"
    met = value >= bound if least else value <= bound
    return f"{_number(value)}× ({'≥' if least else '≤'} {bound:g}{'' if met else ', ' + MISSED})"


def _ratios(cells: Sequence[Cell]) -> str:
    header = ["model", "kernel", "single / floor", "double / single", "tutorial / single", "fastest peer / single"]
    jax = any(NEURAL_TANGENTS in cell.outcomes for cell in cells)
    rows = []
    for cell in cells:
        floor, peer = cell.times(FLOOR), cell.fastest_peer()
        row = [
            _judged(1 / floor if floor else None, cell.asked.floor, least=False),
            _judged(cell.times(DOUBLE), cell.asked.double, least=False),
            _judged(cell.times("tutorial"), cell.asked.tutorial, True, cell.outcomes["tutorial"].note.split(":")[0]),
            "–" if peer is None else f"{_judged(cell.times(peer), cell.asked.peer, least=True)} {peer}",
        ]
        if jax:
            row.append(_judged(cell.times(NEURAL_TANGENTS) if NEURAL_TANGENTS in cell.outcomes else None, None, True))
        rows.append([cell.model, cell.quantity, *row])
    asked = any(cell.asked_mib for cell in cells)
    text = f"In brackets what was asked, {MISSED} where it is not reached." if asked else ""
    return _table("Ratios", header + ["neural-tangents / single"] * jax, rows, text)


def _notes(cells: Sequence[Cell]) -> str:
    """What stands behind a word in the table of seconds."""
    notes = [
        f"- {cell.model} {cell.quantity}, {name}: {outcome.note}"
        for cell in cells
        for name, outcome in cell.outcomes.items()
        if ":" in outcome.note
    ]
    return "\n".join(["What refused or was wrong:", "", *notes]) if notes else ""


def _memory(cells: Sequence[Cell], large: dict[str, int]) -> str:
    rows = []
    for cell in cells:
        for precision, m in cell.memory.items():
            mib, asked = m.measured / 2**20, cell.asked_mib
            missed = f", {MISSED}" if asked and mib > asked and precision == SINGLE else ""
            asks = f" (≤ {asked}{missed})" if asked and precision == SINGLE else ""
            planned = f"{m.planned / 2**20:.1f} ({m.planned / m.measured - 1:+.1%})"
            took = cell.outcomes[precision].seconds
            time = "–" if took is None else f"{m.planned_seconds:.3g} ({m.planned_seconds / took:.2f}×)"
            rows.append([cell.model, cell.quantity, precision, f"{mib:.1f}{asks}", planned, time])
    text = (
        "MiB at the peak over the model itself, asked in single precision, and what `plan` predicts before it runs: "
        "memory, and seconds beside those above."
    )
    if large:
        peaks = ", ".join(f"{b / 1e6:.0f} MB in {p}" for p, b in large.items())
        met = "under" if max(large.values()) < GIGABYTE else f"{MISSED}: over"
        text += f" Trace of {LARGE} examples of the 1024-wide MLP: {peaks}, {met} a gigabyte."
    return _table("Memory", ["model", "kernel", "precision", "peak", "predicted", "predicted seconds"], rows, text)


def _agreement(cells: Sequence[Cell]) -> str:
    names = [SINGLE, DOUBLE, *_others(cells)]

    def error(outcome: Outcome | None) -> str:
        return "–" if outcome is None or outcome.error is None else f"{outcome.error:.1e}"

    rows = [[c.model, c.quantity, *(error(c.outcomes.get(name)) for name in names)] for c in cells]
    text = (
        "‖K − K₆₄‖ / ‖K₆₄‖ of float32 models against a float64 copy. What all share is the rounding of forward and "
        "backward passes, a ReLU that falls on the other side included."
    )
    return _table("Agreement with float64", ["model", "kernel", *names], rows, text)


def _growth(growths: Sequence[Growth]) -> str:
    rows = [
        [
            g.sweep.quantity, g.sweep.symbol, f"{g.sweep.values[0]}…{g.sweep.values[-1]}",
            *(f"{g.exponents(of):.2f}" for of in ("seconds", "floor", "flops")),
            *(f"{g.exponents(of, 3):.2f}" for of in ("seconds", "floor", "flops")),
        ]
        for g in growths
    ]  # fmt: skip
    header = ["kernel", "over", "values", "time", "floor", "operations"] + [
        f"{of}, last 3" for of in ("time", "floor", "operations")
    ]
    text = (
        "Exponents fitted to the time in single precision, to the floor's, and to the operations that `plan` counts; "
        "over all values, and over the last three. The MLP 784-1024-1024-1024-10 with n = 64 in all but what is swept."
    )
    return _table("Growth", header, rows, text)


def _points(growths: Sequence[Growth]) -> str:
    rows = []
    for g in growths:
        points = (f"{v}: {_number(t * 1e3)}" for v, t in zip(g.sweep.values, g.seconds, strict=True))
        rows.append([g.sweep.quantity, g.sweep.symbol, ", ".join(points)])
    return _table("Milliseconds behind the exponents", ["kernel", "over", "value: milliseconds"], rows)


def write(text: str, path: str | None) -> None:
    """To a file and to the terminal."""
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

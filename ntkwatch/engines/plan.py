"""The predicted cost of a kernel, parameter by parameter, and its table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """The cost of one parameter: its rule, operations (multiply-adds ×2), bytes moved, and predicted seconds."""

    name: str
    rule: str
    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The predicted cost of a kernel; `str()` gives a table.

    Attributes:
        engine: the engine's name.
        reason: why this engine, in one line.
        peak_bytes: predicted memory beyond the model's own.
        chunk_size: probes per block.
        table: one row per trained parameter, and one for the passes.
        notes: further remarks, one sentence each.
    """

    engine: str
    reason: str
    peak_bytes: int
    chunk_size: int
    table: tuple[Row, ...] = field(default=())
    notes: tuple[str, ...] = ()

    def rows(self) -> list[Row]:
        """One row per trained parameter, and one for the forward and backward passes."""
        return list(self.table)

    @property
    def seconds(self) -> float:
        """Predicted wall time of all rows."""
        return sum(row.seconds for row in self.table)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 80) -> str:
        """The plan as a table of at most `width` columns (60 at least); below 72 it omits arithmetic and traffic.

        A long name keeps its end, which distinguishes it from its neighbours; a cost beyond the kernel becomes a
        sentence.
        """
        numbers = [("GFLOP", _gflop), ("MB moved", _megabytes), ("time", _seconds)][0 if width >= WIDE else 2 :]
        room = max(LEAST, width) - _NUMBER * len(numbers)
        kernel = [row for row in self.table if not row.name.startswith("+")]
        longest = max([len(row.rule) for row in kernel] + [4])
        name = min(max([len(row.name) for row in kernel] + [9]), room - 2 - min(longest, room * 2 // 5))
        rule = min(longest, room - 2 - name)
        said = max((len(_sentence(row)) for row in self.table if row.name.startswith("+")), default=0)
        rule = min(room - 2 - name, max(rule, said - 2 - name))
        about = f"about {_time(self.seconds)}, {self.peak_bytes / 2**20:.0f} MiB over the model, "
        lines = [*textwrap.wrap(self.reason, width), f"{about}{self.chunk_size} probes a block"]
        lines.append(f"{'parameter':<{name}}  {'rule':<{rule}}" + "".join(f"{h:>{_NUMBER}}" for h, _ in numbers))
        for row in self.table:
            first, *rest = _what(row, name, rule)
            lines += [first + "".join(f"{value(row):>{_NUMBER}}" for _, value in numbers), *rest]
        notes = (textwrap.wrap(f"note: {note}", width, subsequent_indent="  ") for note in self.notes)
        return "\n".join([*lines, *(line for note in notes for line in note)])


def _what(row: Row, name: int, rule: int) -> list[str]:
    """The description of a row, in lines of name + 2 + rule columns."""
    span = name + 2 + rule
    if not row.name.startswith("+"):
        return [f"{_tail(row.name, name):<{name}}  {_head(row.rule, rule):<{rule}}"]
    whole = _sentence(row)
    first, *rest = textwrap.wrap(whole if len(whole) <= span else row.name, span, subsequent_indent="  ")
    return [f"{first:<{span}}", *rest]


def _sentence(row: Row) -> str:
    """A cost beyond the kernel and its reason."""
    return f"{row.name} ({row.rule})"


WIDE, LEAST = 72, 60  # columns: from WIDE on with all numbers, LEAST for the narrowest table
_NUMBER = 9  # columns per number, including the space before it


def _time(seconds: float) -> str:
    """A duration with at most three digits, in a suitable unit."""
    for size, unit in ((60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= (100 if unit == "min" else 1) * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return "< 1 ms" if seconds > 0 else "0"


def _size(value: float) -> str:
    """A number with two digits and no exponent."""
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else "< 0.001"


def _tail(name: str, width: int) -> str:
    """The end of a long name, which distinguishes it from its neighbours."""
    return name if len(name) <= width else "…" + name[1 - width :]


def _head(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _gflop(row: Row) -> str:
    return _size(row.flops / 1e9)


def _megabytes(row: Row) -> str:
    return _size(row.bytes / 1e6)


def _seconds(row: Row) -> str:
    return _time(row.seconds)

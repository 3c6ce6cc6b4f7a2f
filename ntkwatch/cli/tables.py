"""Tables that fit a terminal: no name and no number folds, and no line is wider than the width.

A name that leaves no room for a number is shortened in its middle; columns that do not fit stand in a table of their
own below, with the names again.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from ntkwatch.summary import printable

COLUMN_GAP = 2  # columns between columns
MIN_COLUMN_WIDTH = 8  # that a name is cut to


@dataclass(frozen=True)
class Column:
    """A heading, which may break between its words into so many lines, and a cell for each row."""

    heading: str
    cells: Sequence[str]
    lines: int = 3

    @property
    def least(self) -> int:
        """The width that it takes with its heading broken."""
        narrow = max(map(len, self.heading.split()), default=1)
        while len(textwrap.wrap(self.heading, narrow)) > self.lines:
            narrow += 1
        return max(narrow, *map(len, self.cells)) if self.cells else narrow


def stacked(heading: str, names: Sequence[str], columns: Sequence[Column], width: int) -> list[Table]:
    """As few tables below one another as hold all columns."""
    widest = max((column.least for column in columns), default=0) + COLUMN_GAP
    together = sum(column.least + COLUMN_GAP for column in columns)
    room = max(width - together, width // 2)  # a name may be as long as all columns allow, or half the width
    shown = Column(
        heading, [shorten_middle(name, max(MIN_COLUMN_WIDTH, min(room, width - widest))) for name in names], lines=2
    )
    tables, group = [], list[Column]()
    for column in columns:
        if group and shown.least + sum(c.least + COLUMN_GAP for c in (*group, column)) > width:
            tables.append(table([shown, *group], width))
            group = []
        group.append(column)
    return [*tables, table([shown, *group], width)]


def table(columns: Sequence[Column], width: int, sections: Sequence[tuple[int, str]] = ()) -> Table:
    """One table of columns that fit; the first is aligned left.

    sections: (row, title): the title stands above that row.
    """
    least = [column.least for column in columns]
    spare = width - sum(least) - COLUMN_GAP * (len(columns) - 1)
    made = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, COLUMN_GAP - 1, 0, 0), show_edge=False, header_style="bold"
    )
    for i, column in enumerate(columns):
        whole = len(column.heading) - least[i]
        if 0 < whole <= spare:  # its heading in one line
            spare, least[i] = spare - whole, least[i] + whole
        made.add_column(printable(column.heading), justify="right" if i else "left", width=least[i])
    titles = dict(sections)
    for i, row in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if i in titles:
            if i:
                made.add_row("")
            made.add_row(Text(titles[i], style="bold cyan"))
        made.add_row(*(Text(cell, no_wrap=True) for cell in row))
    return made


def shorten_middle(name: str, width: int) -> str:
    """A name of at most `width` characters: its two ends, which tell it from its neighbours.

    >>> shorten_middle("encoder.layers.10.weight", 16)
    'encoder…0.weight'
    """
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[head + 1 - width :]}"


def pairs(rows: Sequence[tuple[str, str]], style: str = "cyan", width: int | None = None) -> Table:
    """Names and what they are, in two columns."""
    grid = Table.grid(padding=(0, COLUMN_GAP, 0, 0))
    grid.width = width
    grid.add_column(min_width=9, no_wrap=True)
    grid.add_column(ratio=1 if width else None)
    for name, text in rows:
        grid.add_row(Text(name, style=style), Text(text))
    return grid

"""`ntkwatch show --follow`: the record of a run that is still going, redrawn at each new probe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import typer

from ntkwatch.cli import terminal
from ntkwatch.record import Run, load_run

POLL = 1.0  # seconds between two looks


def follow(path: Path) -> None:
    """Until the run says that it has finished, or Ctrl-C, which is how a reader leaves and no error.

    On a terminal: a screen of its own, with the whole of `show` left behind at the end. Piped: a line for each probe.
    """
    console = terminal.console()
    try:
        if console.is_terminal:
            with console.screen() as screen:
                for run in states(path):
                    screen.update(terminal.live(run, console.width))
        else:
            _lines(path)
    except KeyboardInterrupt:
        pass
    if console.is_terminal:
        console.print(terminal.show(load_run(path), console.width))


def states(path: Path) -> Iterator[Run]:
    """The run now, and again whenever it has grown, until it has finished."""
    shown = -1
    while True:
        run = load_run(path)
        if len(run.steps) != shown:
            shown = len(run.steps)
            yield run
        if run.manifest.get("finished"):
            return
        time.sleep(POLL)


def _lines(path: Path) -> None:
    seen: set[int] = set()
    for run in states(path):
        for step in run.steps:
            if step not in seen:
                seen.add(step)
                values = run.metrics.loc[step].dropna().items()
                typer.echo(f"step {step}  " + "  ".join(f"{name} {terminal.format_number(v)}" for name, v in values))

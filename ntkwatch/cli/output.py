"""What several commands print or write: JSON, errors, a comparison as text, tables and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ntkwatch.compare import Comparison
    from ntkwatch.record import Run


def print_comparison(comparison: Comparison) -> None:
    """Print the sentences and tables of a comparison."""
    from ntkwatch.cli import terminal

    console = terminal.console()
    console.print(terminal.comparison(comparison, console.width))
    typer.echo()


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Tables and figures of a comparison, as files in `folder`."""
    import pandas as pd

    from ntkwatch import figures
    from ntkwatch.cli import terminal

    folder.mkdir(parents=True, exist_ok=True)
    slopes = pd.DataFrame({name: s._asdict() for name, s in comparison.slopes.items()}).T.rename_axis("metric")
    tables = {"table": comparison.table, "history": comparison.history, "slopes": slopes.reset_index()}
    if comparison.finite_width is not None:
        tables["finite_width"] = comparison.finite_width.table
    written = []
    for name, table in tables.items():
        written.append(folder / f"{name}.csv")
        table.to_csv(written[-1], index=False)
    with terminal.console(stderr=True).status("drawing"):
        for name, figure in comparison.figures().items():
            written.append(folder / f"{name}.png")
            figures.save(figure, written[-1])
    return written


def run_as_dict(run: Run) -> dict[str, Any]:
    """A run as JSON types, for `show --json`."""
    from ntkwatch.compare import json_rows
    from ntkwatch.summary import layers_at, summarise

    return {
        "folder": str(run.folder),
        "others": [str(other) for other in run.others],
        "manifest": run.manifest,
        "summary": summarise(run),
        "metrics": json_rows(run.metrics.reset_index()),
        "layers": {str(step): layers_at(run.layer_metrics, step) for step in run.steps},
        "reasons": {str(step): reasons for step, reasons in run.reasons.items() if reasons},
    }


def print_json(data: Any) -> None:
    """Print JSON to stdout."""
    typer.echo(json.dumps(data, indent=1, allow_nan=False))


def print_error(message: str) -> None:
    """Print one line to stderr, without control characters."""
    from ntkwatch.cli import terminal
    from ntkwatch.summary import printable

    typer.echo("\n".join(terminal.folded(f"ntkwatch: {printable(' '.join(message.split()))}")), err=True)

"""The command line: arguments → the layers below → terminal, files, exit code (0 fine, 1 a problem found, 2 bad input).

What costs a second to import (torch, pandas, matplotlib) is imported by the command that needs it, so that `--help`
answers at once.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ntkwatch.cli.output import print_comparison, print_error, print_json, run_as_dict, write_comparison

PROBLEM, BAD_INPUT = 1, 2
DEFAULT_FOLDER = Path("ntkwatch_widths")


class _Commands(TyperGroup):
    """Commands whose expected errors are one sentence on stderr and exit code 2 (1 for a damaged record), never a
    traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:
            if not _expected(error):
                raise
            print_error(str(error))
            raise typer.Exit(PROBLEM if _is_damage(error) else BAD_INPUT) from error


def _expected(error: Exception) -> bool:
    """Ours, or the file system's; anything else is a defect that deserves its traceback."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] == "ntkwatch"


def _is_damage(error: Exception) -> bool:
    from ntkwatch.record import DamagedRecord

    return isinstance(error, DamagedRecord)


app = typer.Typer(
    cls=_Commands,
    help="Watch the Neural Tangent Kernel of real training runs: read and compare what was recorded.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, for example lightning_logs/version_0.")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
X = Annotated[str, typer.Option("--x", help="The hyperparameter on the x axis.")]
MinWidth = Annotated[float | None, typer.Option("--min-width", help="Leave out runs with a smaller x.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Compare unlike kernels anyway; printed on the figures.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from ntkwatch import __version__

        typer.echo(f"ntkwatch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def show(
    run: RunPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Refresh until the run ends or Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """One run in words and numbers."""
    if follow and as_json:
        raise typer.BadParameter("--follow and --json exclude each other: JSON is one answer")
    if follow:
        from ntkwatch.cli import follow as live

        return live.follow(run)
    from ntkwatch.cli import terminal
    from ntkwatch.record import load_run

    loaded = load_run(run)
    if as_json:
        return print_json(run_as_dict(loaded))
    console = terminal.console()
    return console.print(terminal.show(loaded, console.width))


@app.command()
def widths(
    runs: RunPaths,
    x: X = "width",
    min_width: MinWidth = None,
    allow_mismatch: AllowMismatch = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for figures and CSV [default: ntkwatch_widths].")
    ] = None,
) -> None:
    """Runs over width: slopes, figures, CSV."""
    from ntkwatch.compare import compare_runs

    comparison = compare_runs(runs, x, allow_mismatch=allow_mismatch, min_width=min_width)
    if not as_json:
        print_comparison(comparison)
    written = write_comparison(comparison, out or DEFAULT_FOLDER) if out or not as_json else []
    if as_json:
        return print_json(comparison.as_dict() | {"files": [str(path) for path in written]})
    for path in written:
        typer.echo(f"wrote {path}")
    return None


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, watched on the same probes.")],
    step: Annotated[int | None, typer.Option("--step", help="The step of the layer table [default: the last].")] = None,
    as_json: AsJson = False,
) -> None:
    """How alike the kernels of two runs are."""
    from ntkwatch.cli import terminal
    from ntkwatch.compare import diff_runs

    difference = diff_runs(a, b, step)
    if as_json:
        return print_json(difference.as_dict())
    console = terminal.console()
    return console.print(terminal.difference(difference, console.width))


@app.command()
def report(
    runs: RunPaths,
    out: Annotated[Path, typer.Option("-o", "--out", help="The page, or a folder for it.")] = Path("report.html"),
    x: X = "width",
    allow_mismatch: AllowMismatch = False,
) -> None:
    """One self-contained HTML page about runs."""
    from ntkwatch.cli import terminal
    from ntkwatch.report import write_report

    with terminal.console(stderr=True).status("drawing"):
        written = write_report(runs, out, x=x, allow_mismatch=allow_mismatch)
    typer.echo(f"wrote {written}")


@app.command()
def explain(metric: Annotated[str | None, typer.Argument(metavar="METRIC")] = None) -> None:
    """What a metric is; without a name, all."""
    from ntkwatch.cli import terminal
    from ntkwatch.cli.glossary import entries, entry, listing

    if metric is None:
        console = terminal.console()
        return console.print(terminal.pairs(listing(), width=min(console.width, terminal.LISTED)))
    text = entry(metric.removeprefix("ntk/"))
    if text is None:
        close = difflib.get_close_matches(metric, entries(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`ntkwatch explain` lists the names"
        print_error(f"no metric is called {metric!r}: {hint}")
        raise typer.Exit(BAD_INPUT)
    return typer.echo("\n".join([metric, "", *terminal.documentation(text, terminal.console().width)]))


@app.command()
def doctor(
    factory: Annotated[str, typer.Argument(metavar="FILE:FACTORY", help="FACTORY() returns (model, batch).")],
    reduction: Annotated[str, typer.Option("--reduction", help="trace, sum, blocks or full.")] = "trace",
    diagnostics: Annotated[
        str, typer.Option("--diagnostics", help="default, full, or names with commas between them.")
    ] = "default",
    probes: Annotated[int, typer.Option("--probes", help="How many, as for the callback.")] = 64,
    outputs: Annotated[str | None, typer.Option("--outputs", help="NAME in FILE, or FILE:NAME.")] = None,
    targets: Annotated[str | None, typer.Option("--targets", help="NAME in FILE, or FILE:NAME.")] = None,
    as_json: AsJson = False,
) -> None:
    """How a model would be measured; the cost."""
    from ntkwatch.cli import terminal
    from ntkwatch.cli.doctor import DoctorOptions, examine

    names = [name.strip() for name in diagnostics.split(",") if name.strip()]
    found = examine(factory, DoctorOptions(reduction, names, probes, outputs, targets))
    if as_json:
        print_json(found.as_dict())
    else:
        width = terminal.console().width
        typer.echo("\n".join(terminal.wrapped(found.lines(width), width)))
    if found.problems:
        raise typer.Exit(PROBLEM)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the runs.")] = Path("ntkwatch_demo"),
) -> None:
    """Train small networks at four widths."""
    from ntkwatch.cli import terminal
    from ntkwatch.cli.demo import MissingDigits, run
    from ntkwatch.compare import compare_runs

    console = terminal.console()
    try:
        root = run(out, console)
    except MissingDigits as error:
        print_error(f"{error.why}; install it, then run the demo again:")
        typer.echo(error.install, err=True)  # in one piece, to be pasted
        raise typer.Exit(PROBLEM) from error
    comparison = compare_runs(root)
    middle = len(comparison.runs) // 2
    console.print(f"\nOne of {len(comparison.runs)} runs in words, {comparison.table['run'][middle]}:\n")
    console.print(terminal.summary(comparison.runs[middle], console.width))
    console.print()
    print_comparison(comparison)
    written = write_comparison(comparison, root / "widths")
    typer.echo(f"the figure to look at first: {next(path for path in written if path.suffix == '.png')}")
    typer.echo(f"the runs in TensorBoard: tensorboard --logdir {root}")
    typer.echo("then open http://localhost:6006/#custom_scalars&_smoothingWeight=0")


def main() -> None:
    """Entry point of the `ntkwatch` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a narrow encoding costs a character, not the answer
    app(prog_name="ntkwatch")

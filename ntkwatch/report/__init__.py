"""Records → one self-contained HTML page: no script, no network, all outside text escaped.

In: folders of runs. Out: one file, by `write_report`; the template beside this file lays it out.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkwatch import figures
from ntkwatch.compare import CompareError, Comparison, compare_runs, json_rows, names_of
from ntkwatch.record import RecordError, Run, find_runs, load_run
from ntkwatch.summary import layers_at, printable, sparkline, summary_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

MAX_RUNS_WITH_FIGURES = 6  # runs with figures of their own: a second each, and a page that a browser opens at once
MAX_SPECTRA = 9  # lines in one spectrum
LOSSES = ("loss", "loss_if_lazy", "loss_if_flow")


def write_report(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    x: str = "width",
    *,
    allow_mismatch: bool = False,
) -> Path:
    """Write the page about these records (or folders that hold some) to `out` and return its path.

    Where `out` is a folder, the page is its report.html.
    Runs that cannot be compared over `x` still get their own sections, and the page says why they are not compared.
    Raises RecordError for a folder without a record, OSError where `out` cannot be written.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    page = render(find_runs([Path(path) for path in given]), x, allow_mismatch=allow_mismatch)
    target = Path(out) / "report.html" if Path(out).is_dir() else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def render(folders: Sequence[Path], x: str = "width", *, allow_mismatch: bool = False) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from ntkwatch import __version__

    environment = Environment(
        loader=PackageLoader("ntkwatch", "report"), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    environment.filters |= {"number": four_digits, "words": lambda name: str(name).replace("_", " ")}
    runs = [load_run(folder) for folder in folders]
    comparison, refusal = _compare(folders, x, allow_mismatch)
    names = names_of(runs)
    return environment.get_template("page.html.j2").render(
        version=__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        comparison=_comparison(comparison) if comparison else None,
        refusal=refusal,
        runs=[
            _run(run, name, drawn=i < MAX_RUNS_WITH_FIGURES)
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ],
        most_drawn=MAX_RUNS_WITH_FIGURES,
        data=[_data(run, name) for run, name in zip(runs, names, strict=True)],
    )


def four_digits(value: Any) -> str:
    """Four significant digits; – where undefined."""
    if value is None or not isinstance(value, int | float) or not math.isfinite(value):
        return "–" if value is None or isinstance(value, float) else str(value)
    return f"{value:.4g}".replace("-", "−")


def _shown(value: Any) -> Any:
    """Text from outside without control characters; what is markup already stays."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def picture(figure: Figure) -> str:
    """The figure as the address of an SVG image: sharp at any size, and walled off from the page around it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _compare(folders: Sequence[Path], x: str, allow_mismatch: bool) -> tuple[Comparison | None, str | None]:
    if len(folders) < 2:
        return None, None
    try:
        return compare_runs(folders, x, allow_mismatch=allow_mismatch), None
    except CompareError as error:
        return None, str(error)


def _comparison(c: Comparison) -> dict[str, Any]:
    drawn = {name: picture(figure) for name, figure in c.figures().items()}
    return c.as_dict() | {
        "figures": {name: image for name, image in drawn.items() if name.startswith("slope_")},
        "courses": {name: image for name, image in drawn.items() if name.startswith("course_")},
        "columns": list(c.slopes),
        "optimizers": sorted(set(c.table["optimizer"])),
    }


def _run(run: Run, name: str, drawn: bool) -> dict[str, Any]:
    steps = run.steps
    shown = _spread(steps, 4)
    return {
        "name": name,
        "folder": str(run.folder),
        "summary": summary_lines(run),
        "steps": shown,
        "metrics": [
            (str(m), [run.metrics[m][step] for step in shown], sparkline(run.metrics[m], 24)) for m in run.metrics
        ],
        "layers": layers_at(run.layer_metrics, steps[-1]) if steps else {},
        "reasons": sorted({(m, why) for by_name in run.reasons.values() for m, why in by_name.items()}),
        "figures": _pictures(run) if drawn and steps else {},
        "facts": _facts(run),
    }


def _pictures(run: Run) -> dict[str, str]:
    """Spectra over the run, and the kernel at its two ends where kernels were saved."""
    spectra = {step: run.eigenvalues(step) for step in _spread(run.steps, MAX_SPECTRA)}
    drawn = {"spectra": picture(figures.spectra(spectra))}
    if (losses := _losses(run)) is not None:
        drawn["loss if lazy"] = losses
    for step in dict.fromkeys((run.steps[0], run.steps[-1])):
        kernel = _square(run, step)
        if kernel is not None:
            drawn[f"kernel at step {step:,}"] = picture(
                figures.kernel_heatmap(kernel, title=f"Kernel at step {step:,}")
            )
    return drawn


def _losses(run: Run) -> str | None:
    """The measured loss beside those of a network that stayed linear; None where there is nothing to set beside it."""
    named = [name for name in LOSSES if name in run.metrics and run.metrics[name].notna().any()]
    if len(named) < 2:
        return None
    title = "Loss on the probes, measured and linearised"
    return picture(figures.named_curves(run.metrics, named, title=title, unit="loss"))


def _square(run: Run, step: int) -> Tensor | None:
    """[n, n]: the kernel or its trace reduction; None where kernels were not saved."""
    try:
        kernel = run.kernel(step)
    except RecordError:
        return None
    return kernel if kernel.ndim == 2 else sum(run.layers(step).values(), kernel.new_zeros(()))


def _facts(run: Run) -> list[tuple[str, str]]:
    """The manifest, without its long lists, as rows of text."""
    manifest = run.manifest | {
        "probes": {k: v for k, v in (run.manifest.get("probes") or {}).items() if k != "indices"}
    }
    rows = []
    for key, value in manifest.items():
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {inner}".strip(), _fact(item)) for inner, item in pairs]
    return rows


def _fact(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]} …"


def _data(run: Run, name: str) -> dict[str, Any]:
    return {"name": name, "manifest": run.manifest, "metrics": json_rows(run.metrics.reset_index())}


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` steps, evenly among those probed, the ends included."""
    last = max(len(steps) - 1, 1)
    return sorted({steps[round(i * (len(steps) - 1) / min(last, most - 1))] for i in range(min(len(steps), most))})

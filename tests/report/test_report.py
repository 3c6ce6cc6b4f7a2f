"""The page: complete without a network, escaped, and honest about what could not be compared."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ntkwatch.record import RecordError, RecordWriter, load_run
from ntkwatch.report import render, write_report
from tests.support.synthetic import write_run, write_sweep

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "{{ 7*7 }}{% for x in y %}",
    "<!-- <svg onload=alert(1)>",
    "javascript:alert(1)",
    "$\\frac{",
    "\x1b[31m\u202egnp",
]  # fmt: skip


class _Page(HTMLParser):
    """The tags, attributes and script texts that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in == ["script"]:
            self.scripts.append(data)
        elif not self._in:
            self.text.append(data)


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root, widths=(32, 64), seeds=1)
    return write_report(root, root / "out" / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained(sweep_page: str) -> None:
    page = _Page(sweep_page)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base"), tag
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "srcset", "action"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#")), f"{tag} asks for {address}"
    assert "default-src 'none'" in sweep_page, "a browser is told to load nothing"
    assert "url(" not in sweep_page.lower()


def test_the_figures_are_drawn(sweep_page: str) -> None:
    images = [a["src"] or "" for tag, a in _Page(sweep_page).tags if tag == "img"]
    assert len(images) == 5 + 2 + 2 * 3, "slopes, courses, and three figures of each run"
    for image in images:
        svg = base64.b64decode(image.partition("base64,")[2])
        assert svg.startswith(b"<?xml")
        assert b"<script" not in svg


def test_the_page_says_the_numbers_and_the_words(sweep_page: str) -> None:
    text = " ".join(" ".join(_Page(sweep_page).text).split())
    assert "nearer −1 (NTP, SP with lr ~ 1/n) than 0" in text
    assert "2 runs (SGD) at step 256, the last they share" in text
    assert "Taylor ratio" in text
    assert "taylor_ratio: no motion yet: this is the baseline" in text


def test_the_data_is_json_that_no_markup_can_leave(sweep_page: str) -> None:
    (script,) = _Page(sweep_page).scripts
    assert "<" not in script
    data = json.loads(script)
    assert [run["name"] for run in data] == ["version_0", "version_1"]
    assert data[0]["metrics"][0]["taylor_ratio"] is None, "undefined is null"
    assert data[0]["metrics"][-1]["step"] == 256


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_from_outside_becomes_markup(
    text: str, sweep_page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 0)  # figures hold no outside text and cost seconds
    folder = tmp_path / text.replace("/", "∕")
    hparams = {"width": 32, text: text}
    run = write_run(folder, hparams=hparams, model=text, optimizer=text, undefined={text: text})
    page = render([run / "ntkwatch"])
    seen = _Page(page)
    assert {tag for tag, _ in seen.tags} <= {tag for tag, _ in _Page(sweep_page).tags}, "a new tag came in"
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    (script,) = seen.scripts
    assert json.loads(script)[0]["manifest"]["model"] == text, "escaped, not changed"
    if text.isprintable():
        assert text in "".join(seen.text), "shown as it is"
    assert "\x1b" not in page


def test_runs_that_cannot_be_compared_still_have_their_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 0)
    write_run(tmp_path / "a", width=32)
    write_run(tmp_path / "b", width=64, mode="train")
    text = " ".join(_Page(write_report(tmp_path, tmp_path / "r.html").read_text(encoding="utf-8")).text)
    assert "do not measure the same kernel: mode: eval in a against train in b" in text
    assert text.count("Linearity") == 2
    allowed = write_report(tmp_path, tmp_path / "r.html", allow_mismatch=True).read_text(encoding="utf-8")
    assert "Mismatch allowed: mode" in allowed


def test_a_run_without_kernels_or_without_probes_has_a_page(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a"))
    writer = RecordWriter.create(tmp_path / "b" / "ntkwatch", run.manifest)
    assert "No probe has been recorded yet" in render([writer.folder])
    writer.append(run.measurement(256), save_kernels=False)
    page = render([writer.folder])
    assert 'alt="spectra"' in page
    assert 'alt="kernel at step' not in page


def test_only_the_first_runs_are_drawn_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ntkwatch.report.MAX_RUNS_WITH_FIGURES", 1)
    write_sweep(tmp_path, widths=(32,), seeds=3, steps=(0, 2))
    page = render([folder / "ntkwatch" for folder in sorted(tmp_path.iterdir())])
    assert page.count('alt="spectra"') == 1
    assert page.count("Figures are drawn for the first 1 of the runs.") == 2
    assert "3 runs with one width (32)" in page


def test_a_page_for_a_folder_lies_in_it(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    run = write_run(tmp_path / "a")
    assert write_report(run, tmp_path / "pages") == tmp_path / "pages" / "report.html"
    assert "<html" in (tmp_path / "pages" / "report.html").read_text(encoding="utf-8")


def test_no_record_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        write_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()

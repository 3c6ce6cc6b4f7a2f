"""Where a record goes: whatever a logger says, or fails to say, costs that logger alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.logger import DummyLogger

from ntkwatch import NTKWatch, load_run
from ntkwatch.frontends.record_place import place_of
from tests.support.runs import Classifier, loaders, trainer


class Logger(DummyLogger):
    """Tells a folder, or raises; keeps nothing."""

    def __init__(self, log_dir: Any = None, save_dir: Any = None, name: Any = "named", version: Any = 3) -> None:
        super().__init__()
        self._told = {"log_dir": log_dir, "save_dir": save_dir, "name": name, "version": version}

    def _tell(self, name: str) -> Any:
        value = self._told[name]
        if isinstance(value, BaseException):
            raise value
        return value

    log_dir = property(lambda self: self._tell("log_dir"))
    save_dir = property(lambda self: self._tell("save_dir"))
    name = property(lambda self: self._tell("name"))  # type: ignore[assignment]
    version = property(lambda self: self._tell("version"))  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


REMOTE = [
    "s3://bucket/run", "gs://bucket/run", "hdfs://host:9000/run", "dbfs:/run", "dbfs:", "memory://run", "az://c/run",
    "abfss://c@account/run", "https://host/run", "hf://datasets/run", "simplecache::s3://bucket/run", "S3://B", "r2+s3://x",
]  # fmt: skip
LOCAL = ["logs", "./logs", "logs/a b", "logs/a:b", "logs:1", "~x", "a@b", "..", "日本"]
ERRORS = [
    OSError("no such share"),
    RuntimeError("not logged in"),
    KeyError("x"),
    NotImplementedError(),
    AssertionError(),
]


def said_by(root: Path, *loggers: Any) -> Any:
    return place_of(SimpleNamespace(loggers=list(loggers), default_root_dir=str(root)))


@pytest.mark.parametrize("where", REMOTE)
def test_a_remote_store_is_no_place_for_a_record(where: str, tmp_path: Path) -> None:
    place = said_by(tmp_path, Logger(log_dir=where, save_dir=where))
    assert place.folder == tmp_path / "ntkwatch" / "named-3"
    assert place.is_log
    assert where in place.said
    assert str(place.folder) in place.said


@pytest.mark.parametrize("where", LOCAL)
def test_a_folder_of_this_machine_is_one(where: str, tmp_path: Path) -> None:
    for told in (where, Path(where)):
        assert said_by(tmp_path, Logger(log_dir=told)).folder == Path(where) / "ntkwatch"
        assert said_by(tmp_path, Logger(save_dir=told)).folder == Path(where) / "ntkwatch" / "named-3"
        assert said_by(tmp_path, Logger(log_dir=told)).said is None


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
def test_a_logger_that_fails_is_passed_over(error: Exception, tmp_path: Path) -> None:
    place = said_by(tmp_path, Logger(log_dir=error, save_dir=error), Logger(log_dir=str(tmp_path / "b")))
    assert place.folder == tmp_path / "b" / "ntkwatch"
    assert f"Logger.log_dir fails ({type(error).__name__}" in place.said
    alone = said_by(tmp_path, Logger(log_dir=error, save_dir=error, name=error, version=error))
    assert alone.folder.parent == tmp_path / "ntkwatch"
    assert alone.folder.name.startswith("run-")
    assert not alone.is_log


@pytest.mark.parametrize("nothing", [None, "", 7, b"bytes", object(), ["x"], {}])
def test_what_is_no_folder_is_passed_over_in_silence(nothing: Any, tmp_path: Path) -> None:
    place = said_by(tmp_path, Logger(log_dir=nothing, save_dir=nothing))
    assert (place.folder, place.said) == (tmp_path / "ntkwatch" / "named-3", None)


@pytest.mark.parametrize("root", ["s3://bucket", None, "", OSError("gone")])
def test_without_a_root_the_record_goes_to_the_working_directory(root: Any) -> None:
    class Trainer:
        loggers = ()
        default_root_dir = property(lambda self: (_ for _ in ()).throw(root) if isinstance(root, Exception) else root)

    place = place_of(Trainer())
    assert place.folder.parent == Path.cwd() / "ntkwatch"
    assert (place.said is None) == (root in (None, ""))


def test_a_hostile_name_stays_in_its_folder(tmp_path: Path) -> None:
    for name in ("../../x", "/etc", "a\0b", "con", ""):
        place = said_by(tmp_path, Logger(name=name))
        assert place.folder.resolve().parent == (tmp_path / "ntkwatch").resolve(), name


@pytest.mark.parametrize("broken", [Logger(log_dir=OSError("no such share")), Logger(log_dir="s3://bucket/run")],
                         ids=["fails", "remote"])  # fmt: skip
def test_a_run_keeps_its_record_and_its_other_logger(broken: Any, tmp_path: Path) -> None:
    watch, good = NTKWatch(probes=8, every=2, budget=None), CSVLogger(tmp_path, name="", version=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, watch, logger=[broken, good], max_steps=4).fit(Classifier(), *loaders())
    assert load_run(tmp_path / "version_0").steps == [0, 2, 4]
    assert "ntk/kernel_angle" in (tmp_path / "version_0" / "metrics.csv").read_text()
    ours = [str(each.message) for each in said if "NTKWatch" in str(each.message)]
    assert len(ours) == 1, ours
    assert f"the record is in {watch.record}" in ours[0]

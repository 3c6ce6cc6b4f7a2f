"""The sample that `make quick` runs: every file, always the same tests, nothing slow without need."""

from __future__ import annotations

import re

import pytest

from tests.quick import SHARE, SLOW, sample, seconds
from tests.support import ROOT


def names(file: str, *functions: str, cases: int = 1) -> list[str]:
    return [f"tests/{file}::{function}[{case}]" for function in functions for case in range(cases)]


FILES = {
    "one test": names("test_a.py", "test_one"),
    "many cases": names("test_b.py", "test_one", "test_two", cases=50),
    "doctests": ["ntkwatch/metrics/distance.py::ntkwatch.metrics.distance.cka"],
    "slow and others": [*names("bench/test_bench.py", "test_x", cases=4), "tests/bench/test_bench.py::test_quick_page"],
    "slow alone": names("watching/test_results.py", "test_the_process_that_called_fit_reads_the_record", cases=2),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_in_and_nothing_slow_without_need(name: str) -> None:
    tests = FILES[name]
    kept = sample(tests)
    assert kept <= set(tests)
    assert kept, "the file is not in the sample"
    assert len(kept) <= len(tests) / SHARE + 1, f"{len(kept)} of {len(tests)}"
    if len(kept) > 1 or name != "slow alone":
        assert not any(map(seconds, kept)), kept


def test_it_is_the_same_in_any_order_and_a_new_test_moves_few() -> None:
    every = [test for tests in FILES.values() for test in tests]
    assert sample(every) == sample(every[::-1])
    more = sample([*every, *names("test_b.py", "test_new")])
    assert len(more ^ sample(every)) <= 2


@pytest.mark.parametrize("test", SLOW)
def test_the_table_of_slow_tests_names_tests_that_there_are(test: str) -> None:
    file, function = test.split("::")
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE), test

"""The claims' small forms hold, and a claim that fails is seen."""

from __future__ import annotations

import math

import pytest

from tests.claims import __main__ as claims
from tests.claims.table import Row, around, between, show

SAMPLE = ("C10", "C11", "C7-C8")  # the others take longer than a few seconds: `make claims`


@pytest.mark.parametrize("name", SAMPLE)
def test_the_sample_holds(name: str) -> None:
    rows = claims.CLAIMS[name](True)
    assert all(row.holds for row in rows), "\n" + show(rows)


def test_what_is_outside_its_band_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    rows = [between("C0", "inside", 1.0, 0, 2), between("C0", "outside", 3.0, 0, 2)]
    monkeypatch.setattr(claims, "CLAIMS", {"C0": lambda quick: rows})
    assert claims.main([]) == 1
    out = capsys.readouterr().out
    assert "✗ outside" in out
    assert "1 of 2 inside" in out
    monkeypatch.setattr(claims, "CLAIMS", {"C0": lambda quick: rows[:1]})
    assert claims.main(["C0"]) == 0
    assert claims.main(["C99"]) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_holds_nothing(value: float) -> None:
    rows: list[Row] = [between("C0", "", value, 0, 1), around("C0", "", value, 1.0)]
    assert not any(row.holds for row in rows)

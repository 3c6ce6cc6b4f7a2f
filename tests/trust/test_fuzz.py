"""Promise 2: training is bitwise unchanged in any configuration, by seeded fuzz."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest

from tests.support.trust_fuzz import draw, job, watcher
from tests.support.trust_harness import Tally, observe


def sweep(seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        chosen = draw(seed)
        watch, missing = watcher(chosen)
        tally.compare(repr(chosen), observe(job(chosen)), observe(job(chosen), watch=watch))
        if (why := missing()) is None:
            tally.recorded += 1
        else:
            tally.unrecorded.append(f"{chosen!r}: {why}")
    return tally


def run(seeds: range, capsys: pytest.CaptureFixture[str]) -> None:
    tally = sweep(seeds)
    with capsys.disabled():
        print("\n" + tally.line("promise 2", "random configurations"))
    assert tally.faults() == ""
    assert (tally.cells, tally.recorded) == (len(seeds), len(seeds))


def test_the_choices_are_spread() -> None:
    """Every value of every choice occurs among the 50 of `make test` or, at the latest, the 500 of the soak."""
    drawn = [draw(seed) for seed in range(500)]
    for choice in fields(drawn[0]):
        values = Counter(str(getattr(chosen, choice.name)) for chosen in drawn)
        assert len(values) > 1, f"{choice.name} never varies"
        assert choice.name == "seed" or min(values.values()) >= 20, f"{choice.name} is too rare: {values}"


def test_fifty_random_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    run(range(50), capsys)


@pytest.mark.soak
def test_five_hundred_random_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    run(range(500), capsys)

"""`make mutants`: every planted bug against the tests that must see it; exit 1 where one is not seen.

`python -m tests.mutants [--list] [NAME …]` runs all or the named ones. The same tests first pass without a bug.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from tests.mutants.planting import Bug
from tests.mutants.running import Outcome, Workspace
from tests.mutants.table import BUGS

WORKERS = 2  # processes at a time, of one thread each


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 where every bug is caught, 1 where one is not or tests fail without any, 2 for an unknown name."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    known = {bug.name: bug for bug in BUGS}
    if unknown := [name for name in names if name not in known]:
        print(f"unknown bugs {unknown}: use some of {', '.join(known)}")
        return 2
    wanted = [known[name] for name in names] or list(BUGS)
    if "--list" in arguments:
        print(*(f"{bug.name:<44} {bug.what}" for bug in wanted), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workspaces = [Workspace(Path(folder) / str(i)) for i in range(WORKERS)]
        sound = controls(workspaces, wanted)
        print(f"{'planted bug':<44} {'seconds':>7}  caught by")
        found = list(outcomes(workspaces, wanted))
    return max(total(found), int(not sound))


def controls(workspaces: Sequence[Workspace], bugs: Iterable[Bug]) -> bool:
    """Whether all the tests pass where no bug is planted."""
    began, tests = time.perf_counter(), sorted({test for bug in bugs for test in bug.selection})
    files = sorted({test.partition("::")[0] for test in tests})
    shares = [[t for t in tests if files.index(t.partition("::")[0]) % WORKERS == i] for i in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        pairs = [(w, share) for w, share in zip(workspaces, shares, strict=True) if share]
        answers = list(pool.map(lambda pair: pair[0].tests(pair[1], limit=1800.0), pairs))
    for code, said in answers:
        print(
            *(f"without a bug: {line}{'' if code == 0 else ': what it catches is in doubt'}" for line in said), sep="\n"
        )
    print(f"{len(tests)} tests without a bug in {time.perf_counter() - began:.0f} s", flush=True)
    return all(code == 0 for code, _ in answers)


def outcomes(workspaces: Sequence[Workspace], bugs: Iterable[Bug]) -> Iterator[Outcome]:
    """One after the other in each workspace, printed as they come."""
    free: Queue[Workspace] = Queue()
    for workspace in workspaces:
        free.put(workspace)

    def run(bug: Bug) -> Outcome:
        workspace = free.get()
        try:
            return workspace.run(bug)
        finally:
            free.put(workspace)

    with ThreadPoolExecutor(len(workspaces)) as pool:
        for outcome in pool.map(run, bugs):
            mark = "" if outcome.caught else "NOT CAUGHT: "
            print(f"{outcome.bug.name:<44} {outcome.seconds:7.1f}  {mark}{outcome.said[:140]}", flush=True)
            yield outcome


def total(found: Sequence[Outcome]) -> int:
    """Prints the sums; the exit code."""
    missed = [outcome for outcome in found if not outcome.caught]
    print(f"{len(found)} planted, {len(found) - len(missed)} caught, {len(missed)} not")
    for outcome in missed:
        print(f"  {outcome.bug.name}: {outcome.bug.what} ({outcome.said})")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

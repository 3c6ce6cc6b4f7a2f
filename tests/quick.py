"""One seeded sample of everything: what `pytest --quick` and `make quick` keep of each file's tests.

A quarter of a file's tests, in the order of a hash of their names, so that a new test moves no other in or out. What
takes long is left out, but for the shortest of a file that has nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from hashlib import sha256

SEED = 0
SHARE = 4  # one test in so many
SLOW = {  # seconds of one call (with what it alone sets up), on two cores of 2.6 GHz
    "tests/bench/test_bench.py::test_quick_page": 5,
    "tests/frontends/test_lightning.py::test_both_lightnings": 12,
    "tests/cli/test_commands.py::test_exit_codes_of_the_real_process": 4,
    "tests/engines/test_memory.py::test_a_kernel_that_is_not_predicted_takes_no_more_than_is_allowed": 11,
    "tests/engines/test_memory.py::test_limited_address_space": 8,
    "tests/engines/test_memory.py::test_peak_memory_is_predicted": 3,
    "tests/engines/test_memory.py::test_peak_memory_is_predicted_where_shapes_depend_on_values": 11,
    "tests/engines/test_memory.py::test_peak_memory_is_predicted_with_a_kernel_per_parameter": 6,
    "tests/engines/test_memory.py::test_peak_memory_of_the_functional_engine_is_predicted": 4,
    "tests/engines/test_zoo.py::test_the_portions_of_a_gpu": 5,
    "tests/frontends/test_environment.py::test_a_script_that_does_not_know_of_it": 6,
    "tests/test_examples.py::test_example": 13,
    "tests/test_examples.py::test_the_demo_trains_watches_and_compares": 4,
    "tests/metrics/test_regression.py::test_gp_posterior_is_the_spread_of_sixty_trained_antithetic_pairs": 4,
    "tests/watching/test_results.py::test_the_process_that_called_fit_reads_the_record": 21,
    "tests/record/test_record.py::test_a_reader_never_sees_a_torn_state": 4,
    "tests/trust/test_bitwise.py::test_a_forecast_trained_beside_the_run_leaves_it_as_it_is": 6,
    "tests/trust/test_bitwise.py::test_a_monitor_in_any_hook_leaves_training_as_it_is": 14,
    "tests/trust/test_bitwise.py::test_the_callback_in_every_configuration_under_both_import_names": 24,
    "tests/trust/test_ddp.py::test_a_sample_of_ddp_runs": 74,
    "tests/trust/test_faults.py::test_a_failing_probe_changes_nothing": 23,
    "tests/trust/test_fuzz.py::test_fifty_random_configurations": 37,
    "tests/trust/test_leaks.py::test_a_compiled_model_compiles_nothing_anew": 16,
    "tests/trust/test_leaks.py::test_probes_leak_nothing": 14,
    "tests/trust/test_loggers.py::test_failing_outlets_change_nothing": 13,
    "tests/trust/test_mutants.py::test_a_careful_probe_passes": 6,
    "tests/trust/test_ranks.py::test_a_sample_of_cells": 50,
    "tests/trust/test_signals.py::test_a_signal_in_a_probe": 17,
}


def sample(names: Iterable[str]) -> set[str]:
    """Of pytest's names of tests, `file::function[case]`, those that are kept."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.split("::")[0], []).append(name)
    return {name for tests in files.values() for name in _of_one_file(tests)}


def _of_one_file(tests: list[str]) -> list[str]:
    fast = sorted((test for test in tests if seconds(test) == 0), key=_order)
    return fast[: math.ceil(len(tests) / SHARE)] or [min(tests, key=lambda test: (seconds(test), _order(test)))]


def seconds(test: str) -> int:
    """Of a test in the table; 0 for all others, which take less than 3."""
    return SLOW.get(test.split("[")[0], 0)


def _order(test: str) -> bytes:
    return sha256(f"{SEED} {test}".encode()).digest()

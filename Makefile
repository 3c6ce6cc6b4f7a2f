# Every target works alone on a machine with Python >= 3.10, git and make.
PYTHON ?= python3
BIN := .venv/bin
RUN := OMP_NUM_THREADS=2 $(BIN)/python
JOBS ?= 2
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n $(JOBS) --dist worksteal
STAMP := .venv/.installed
PEERS := .venv-peers

.PHONY: setup demo test quick test-portable soak mutants gpu check bench bench-jax claims clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: setup            ## train digits at four widths with the callback, then compare them
	$(BIN)/ntkwatch demo

check: setup           ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup check      ## everything that CI runs, on two cores; JOBS=8 on eight
	$(TEST)

quick: setup           ## a seeded sample of every file's tests, in under 5 minutes
	$(TEST) --quick

test-portable: setup   ## the numeric tests as on other CPUs and with other numbers of threads; FLAGS="--setting NAME FILE"
	$(BIN)/python -m tests.portable --jobs $(JOBS) $(FLAGS)

soak: setup            ## the long sweeps, with their full counts
	$(RUN) -m pytest -m soak -s

mutants: setup         ## planted bugs against the tests that must see them: a table, and exit 1 where one survives
	$(BIN)/python -m tests.mutants $(FLAGS)

gpu: setup             ## the engines and the promises to a run, measured on a GPU, which CI has not
	$(RUN) -m pytest -m "not soak" --device cuda tests/test_gpu.py tests/engines/test_zoo.py tests/engines/test_auto.py \
	  tests/engines/test_precision.py tests/metrics/test_contract.py tests/trust/test_bitwise.py \
	  tests/trust/test_leaks.py tests/trust/test_exotics.py tests/engines/test_backward.py tests/engines/test_signs.py

bench: $(PEERS)/.installed  ## speed, memory and agreement beside other libraries, in an environment of its own; FLAGS="--output FILE"
	OMP_NUM_THREADS=2 $(PEERS)/bin/python -m tests.bench.run $(FLAGS)

$(PEERS)/.installed: pyproject.toml constraints.txt tests/bench/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement tests/bench/peers.txt
	touch $@

bench-jax: setup       ## infinite beside neural-tangents: builds its JAX environment, then table, speed, growth
	$(RUN) -m tests.bench.neural_tangents --speed

claims: setup          ## what the literature says beside what is measured, minutes
	$(RUN) -m tests.claims

clean:
	rm -rf .venv $(PEERS) .pytest_cache .mypy_cache .ruff_cache

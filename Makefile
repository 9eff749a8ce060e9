# make demo and make test need python3 (3.11 or newer) and make; each creates .venv with all that it needs.
PYTHON ?= python3
# On Linux mlx needs a backend: EXTRA=cuda12 or EXTRA=cuda13 for CUDA. On macOS it brings Metal.
EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
MODEL := examples/tiny-qwen3-vl-moe
QUESTION ?= What is this package?
# Of tests/fuzz/run.py: --seconds, --mutants, --only FIXTURE, --seed, --replay ID.
FUZZ ?= --seconds 600
# A worker a core; the tests of one file mostly stay together, as they share what takes long to make.
# On a terminal, a bar shows the file that runs and how far it is; elsewhere, a line a test.
PYTEST = @test -t 1 || verbose=--verbose; \
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal $$verbose --durations=10
DRAWN := $(addprefix tests/test_,$(addsuffix .py,patterns properties way_back)) # all of hypothesis's examples
STARTING := $(addprefix tests/test_,$(addsuffix .py,claims doctor host plugins registry security))
VENV := .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: demo test test-rest test-all lint fuzz matrix downstream bench bench-quick bench-real bench-real-quick clean

demo: $(VENV)/demo.stamp
	@echo "Asking the tiny model in $(MODEL). Another question: make demo QUESTION='Who are you?'"
	@echo
	@$(BIN)/python examples/demo.py "$(QUESTION)"

# Every feature, in a few minutes; see the marker "thorough" in pyproject.toml.
test: $(VENV)/test.stamp
	$(PYTEST) -m "not thorough"

# What `make test` leaves out: more of each kind, and tests of starting Python without the process that they fork from.
test-rest: $(VENV)/test.stamp
	$(PYTEST) -m thorough
	$(PYTEST) -m "not thorough" --fresh $(STARTING)
	$(PYTEST) $(DRAWN)

test-all: test test-rest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo.stamp: EXTRAS = $(EXTRA)
$(VENV)/test.stamp: EXTRAS = $(if $(EXTRA),$(EXTRA)$(comma))test
$(VENV)/dev.stamp: EXTRAS = $(if $(EXTRA),$(EXTRA)$(comma))dev
$(VENV)/bench.stamp: EXTRAS = $(if $(EXTRA),$(EXTRA)$(comma))bench
$(VENV)/%.stamp: pyproject.toml $(wildcard startup/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Name another one: PYTHON=python3.12 make" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing this package$(if $(EXTRAS), [$(EXTRAS)]) and mlx-lm in $(VENV). The first time takes a minute or two"
	@test -t 1 || quiet=--quiet; \
	$(BIN)/python -m pip install $$quiet --disable-pip-version-check --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

# Mutants of every fixture: right numbers, or one error. See CONTRIBUTING.md.
fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

matrix: $(VENV)/dev.stamp
	$(BIN)/nox --no-error-on-missing-interpreters

# Programs of others, of PyPI: 20 minutes, and 8 GB of disk for the torch of some. `.ci/run` has the quick ones.
downstream: $(VENV)/test.stamp
	$(BIN)/python -m pytest --verbose --durations=10 tests/downstream

# Every measurement, for the figures and the plot in docs: up to 40 minutes, 12 GB of memory and 20 GB of disk.
bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/run.py

# The same with small sizes, in less than 5 minutes; writes nothing.
bench-quick: $(VENV)/test.stamp
	$(BIN)/python benchmarks/run.py --quick

# The 30B's true shapes, converted and run: an hour, up to 60 GB of disk, 24 GB of memory; writes its table in docs.
bench-real: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/real.py

# Some layers of it, in 3 minutes; writes nothing.
bench-real-quick: $(VENV)/test.stamp
	$(BIN)/python benchmarks/real.py --quick

clean:
	rm -rf $(VENV) build dist

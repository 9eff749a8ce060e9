# make demo and make test need python3 (3.11 or newer) and make; each creates .venv with all that it needs.
PYTHON ?= python3
# On Linux mlx needs a backend: EXTRA=cuda12 or EXTRA=cuda13 for CUDA. On macOS it brings Metal.
EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
MODEL := examples/tiny-qwen3-vl-moe
QUESTION ?= What is this package?
# Of tests/fuzz/run.py: --seconds, --mutants, --only FIXTURE, --seed, --replay ID.
FUZZ ?= --seconds 600
# A worker a core; the tests of one file mostly stay together, as they share what takes long to make.
PARALLEL := -n auto --maxprocesses=8 --dist worksteal
VENV := .venv
BIN := $(VENV)/bin
comma := ,

.PHONY: demo test test-all lint fuzz matrix bench bench-quick bench-real bench-real-quick clean

demo: $(VENV)/demo.stamp
	@echo "Asking the tiny model in $(MODEL). Another question: make demo QUESTION='Who are you?'"
	@echo
	@$(BIN)/python examples/demo.py "$(QUESTION)"

# Every feature, in a few minutes; see the marker "thorough" in pyproject.toml.
test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PARALLEL) --durations=10 -m "not thorough"

test-all: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PARALLEL) --durations=10 --fresh

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

# Mutants of every fixture: right numbers, or one error. See docs/fuzzing.md.
fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

matrix: $(VENV)/dev.stamp
	$(BIN)/nox --no-error-on-missing-interpreters

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

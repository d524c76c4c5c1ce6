# Fresh machine: Python 3.11 or newer, make, pip. Nothing else; no Docker, no root, no GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
N ?= 200
SEED ?= 1
# Files of tests that run side by side. More than two on two cores: those that kill processes mostly wait.
SIDE ?= 3

# Threads that spin at barriers for long slow everything down as soon as a machine is busy (worker/program/launcher.py).
export GOMP_SPINCOUNT := 10000

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench chaos clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

setup: $(STAMP) ## .venv with everything, at the versions of constraints.txt

# Re-made only when what is asked for changes; the code itself is installed in place.
$(STAMP): pyproject.toml cli/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tunepool needs Python 3.11 or newer; try: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned set of constraints.txt into $(VENV); a few minutes the first time."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embedded,train,dev]' -e ./cli
	@touch $@

demo: setup ## the main job: a real model, real QLoRA, through the real API; base and tuned answers side by side
	$(BIN)/python -m examples.demo

test: setup ## every test, on a real Postgres and a real Valkey from wheels; FAST=1: the quick ones, for the loop of work
	$(BIN)/python -m pytest $(if $(FAST),tests/unit tests/integration -m "not slow") -n $(SIDE) --dist loadfile --no-loadscope-reorder

check: setup ## format, lint, types, import laws
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict -p tunepool -p examples
	$(BIN)/lint-imports

bench: setup ## the measured claims; each prints ratios taken side by side in one run
	@for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

chaos: setup ## N random fault schedules from SEED against real processes
	TUNEPOOL_CHAOS_SCHEDULES=$(N) TUNEPOOL_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -v tests/faults/test_chaos.py

clean: ## .venv and caches; the state in .tunepool stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

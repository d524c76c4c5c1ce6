# Fresh machine: Python 3.11 or newer, make, pip. Nothing else; no Docker, no root, no GPU. What a GPU host needs besides:
# docs/gpu-hosts.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's build: cpu, cu126, cu128 or cu130, of PyTorch's own index. Empty: the one of the default index, which is
# for CUDA 13.0 (drivers from 580 on; docs/gpu-hosts.md). What was chosen once is kept.
TORCH ?= $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH_BUILDS := cpu cu126 cu128 cu130
TORCH_VERSION = $(shell sed -n 's/^torch==//p' constraints.txt)
STAMP := $(VENV)/.installed$(addprefix -,$(TORCH))
N ?= 200
SEED ?= 1
# Files of tests that run side by side. More than two on two cores: those that kill processes mostly wait. The quick ones
# do not, and each process that takes part has to import and collect them all.
SIDE ?= $(if $(FAST),2,3)

# Compiled before a test starts: where PYTHONDONTWRITEBYTECODE is set, every one of a thousand processes would do it anew,
# half a second each. The tests themselves are compiled by pytest (tests/compiled.py).
CODE := api shared worker standalone migrations cli/src tests examples

# Threads that spin at barriers for long slow everything down as soon as a machine is busy (worker/program/launcher.py).
export GOMP_SPINCOUNT := 10000

.DEFAULT_GOAL := help
.PHONY: help setup env demo test check bench gpu chaos clients lock audit sbom clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

setup: $(STAMP) ## .venv with everything, at the versions of constraints.txt; TORCH=cpu|cu126|cu128|cu130: PyTorch's build

# Re-made only when what is asked for changes; the code itself is installed in place.
$(STAMP): pyproject.toml cli/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tunepool needs Python 3.11 or newer; try: make PYTHON=python3.12 …")'
	$(if $(filter-out $(TORCH_BUILDS),$(TORCH)),@echo "TORCH=$(TORCH) is no build that we know; take one of: $(TORCH_BUILDS)"; exit 2)
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON); some seconds."; $(PYTHON) -m venv $(VENV); }
	$(if $(TORCH),@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)/$(TORCH)) torch==$(TORCH_VERSION)+$(TORCH) || { echo "No build $(TORCH) of PyTorch $(TORCH_VERSION) was there: see the error above. Name the index of the PyTorch builds without its last part: make setup TORCH=$(TORCH) TORCH_INDEX=https://…/whl"; exit 1; })
	@echo "Installing the pinned set of constraints.txt into $(VENV); a few minutes the first time."
	@$(BIN)/python standalone/installing.py --disable-pip-version-check -c constraints.txt pip
	@$(BIN)/python -m standalone.page_parts > $(VENV)/.page-parts 2>&1 & \
	$(BIN)/python standalone/installing.py --disable-pip-version-check -c constraints.txt -e '.[embedded,train,trackers,traces,kubernetes,dev]' -e ./cli; \
	code=$$?; wait; cat $(VENV)/.page-parts; rm -f $(VENV)/.page-parts; exit $$code
	@rm -f $(VENV)/.installed* && printf '%s' '$(TORCH)' > $(VENV)/.torch && touch $@

env: ## .env with random secrets for `docker compose`, readable by you alone; one that is there stays
	@$(PYTHON) -c "$$WRITE_ENV"

define WRITE_ENV
import os, secrets
names = "POSTGRES_PASSWORD VALKEY_PASSWORD S3_ACCESS_KEY S3_SECRET_KEY TUNEPOOL_SIGNING_SECRET".split()
try:
    descriptor = os.open(".env", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
except FileExistsError:
    print(".env is there already and stays as it is.")
else:
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{name}={secrets.token_hex(24)}\n" for name in names)
    print("Wrote .env. Next: docker compose up -d")
endef
export WRITE_ENV

demo: setup ## the main job: a real model, real QLoRA, through the real API; base and tuned answers side by side
	$(BIN)/python -m examples.demo

test: setup ## every test, on a real Postgres and a real Valkey from wheels; FAST=1: the quick ones, for the loop of work
	@$(BIN)/python -m compileall -q -j 0 -x '/test_[^/]*\.py$$' $(CODE)
	$(BIN)/python -m pytest $(if $(FAST),tests/unit tests/integration -m "not slow") -n $(SIDE) --dist loadfile --no-loadscope-reorder --durations 20

check: setup ## format, lint, types, import laws, locks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict -p tunepool -p examples
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/unit/test_locks.py

bench: setup ## the measured claims; each prints ratios taken side by side in one run
	@for script in $(filter-out bench/gpu_acceptance.py bench/peers.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

gpu: setup ## on a host with a GPU: what only one can show, as JSON lines, in ten minutes; then the tests marked gpu
	$(BIN)/python bench/gpu_acceptance.py
	$(BIN)/python -m pytest -m gpu

chaos: setup ## N random fault schedules from SEED against real processes, SIDE worlds side by side
	TUNEPOOL_CHAOS_SCHEDULES=$(N) TUNEPOOL_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -v tests/faults/test_chaos.py -n $(SIDE) --dist load

clients: setup ## clients that others wrote, at fixed versions, into .clients; their tests are skipped without; needs the indexes
	@mkdir -p .clients/node && cp tests/other_clients/package*.json .clients/node/
	@if command -v npm >/dev/null; then cd .clients/node && npm ci --ignore-scripts --no-audit --no-fund; else echo "npm is not here: no client for Node"; fi
	@test -x .clients/python/bin/python || $(PYTHON) -m venv .clients/python
	@.clients/python/bin/python -m pip install --quiet --disable-pip-version-check dspy==3.4.1 litellm==1.110.2 instructor==1.17.0
	$(BIN)/python -m pytest tests/e2e/test_other_clients.py

# Resolved by uv, which lists the hash of every file of a release, so that each architecture finds its own.
LOCK = $(BIN)/uv pip compile -q pyproject.toml - -c constraints.txt --universal --python-version 3.11 \
	--generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links
lock: setup ## requirements.*.lock anew: what the images install, each file by its sha256; needs the package index
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	printf '%s\n' 'hatchling>=1.27' editables pip | $(LOCK) --extra traces -o requirements.api.lock
	printf '%s\n' 'hatchling>=1.27' editables pip | $(LOCK) --extra train --extra trackers --extra traces --extra kubernetes -o requirements.worker.lock
	@$(BIN)/python -m pip uninstall --quiet --yes uv

audit: setup ## what the public database of advisories knows of our versions; needs the network
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	.audit/bin/pip-audit --disable-pip --no-deps -r requirements.worker.lock

sbom: setup ## sbom.json: what this installation is made of, as CycloneDX
	$(BIN)/python -m standalone.parts_list > sbom.json

clean: ## .venv and caches; the state in .tunepool stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

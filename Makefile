# The commands of this repository; every tool is called from .venv, which is made on demand.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where pip looks for torch besides PyPI, whose torch for Linux brings CUDA's libraries; a build for the CPU found here is preferred.
# Nothing by default: pip would wait minutes for an index that cannot be reached.
TORCH_INDEX ?=
# UNLOCKED=1: what pyproject.toml does not pin itself is the newest that fits, not what requirements/dev.txt has locked.
UNLOCKED ?=
# protoc finds its plugins (mypy-protobuf) by PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
PYTEST_ARGUMENTS ?=
# Test files at once, each with servers of its own (about 2 GB); most tests wait more than they compute.
PYTEST_WORKERS ?= 2
UP_ARGUMENTS ?=
BENCH_ARGUMENTS ?=
CHAOS_ARGUMENTS ?=
REHEARSE_ARGUMENTS ?=
MINUTES ?= 10

.PHONY: help setup demo up test check protos lock upgrade-check bench soak chaos rehearse clean

help: ## Shows these commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The .pth file puts the source roots on the path as plain entries: by the editable install's import hook alone, a folder that
# happens to be called ai4thai (this checkout, seen from its parent) would hide the package.
# Installed again only when pyproject.toml says something else than at the last time; a new date alone costs nothing.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed ($(PYTHON) was not found): install it, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@if cmp -s pyproject.toml $(READY); then touch $(READY); else \
	  echo "Installing into $(VENV); the first time this takes some minutes, and gigabytes where pip takes torch for CUDA."; \
	  $(if $(TORCH_INDEX),,echo "The small build for the CPU: make TORCH_INDEX=https://download.pytorch.org/whl/cpu setup";) \
	  sed -n 's/^\([A-Za-z0-9][^ ]*==[^ ]*\).*/\1/p' requirements/dev.txt >$(VENV)/locked.txt && \
	  { $(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    $(if $(UNLOCKED),,--constraint $(VENV)/locked.txt) -e '.[dev]' || \
	    { echo "If versions conflict, pyproject.toml has changed since requirements/dev.txt was locked: make lock"; exit 1; }; } && \
	  printf '%s\n' '$(CURDIR)/clients' '$(CURDIR)' >"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ai4thai-source.pth" && \
	  cp pyproject.toml $(READY); \
	fi

setup: $(READY) ## Makes .venv and installs everything into it.
	@echo "Ready: $(BIN)/ai4thai --help"

demo: $(READY) ## Starts everything on free ports, shows what it can do, stops it again.
	@$(BIN)/ai4thai demo

up: $(READY) ## Starts everything on this machine; Ctrl-C stops it.
	@$(BIN)/ai4thai up $(UP_ARGUMENTS)

test: $(READY) ## Runs all tests.
	$(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGUMENTS)

check: $(READY) ## Lints, formats, types, imports, the contract and its stubs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	@for released in protos/released/*.binpb; do echo "buf breaking --against $$released"; $(BIN)/buf build protos -o -#format=binpb | $(BIN)/buf breaking -#format=binpb --against $$released || exit 1; done
	$(BIN)/python protos/generate.py --check
	$(BIN)/python requirements/lock.py --check

protos: $(READY) ## Generates the stubs of the contract.
	$(BIN)/python protos/generate.py

# Unlocked, since a pin that has just changed contradicts the old lock; the next command installs what is locked then.
lock: UNLOCKED = 1
lock: $(READY) ## Locks what pyproject.toml pins; UPGRADE=package or UPGRADE=all lets go of older pins, SETS=queue locks one set.
	$(BIN)/python requirements/lock.py $(SETS) --upgrade '$(UPGRADE)'
	@rm -f $(READY)

upgrade-check: $(READY) ## What is newer than our pins? PACKAGE=redis VERSION=8.2.0 tries it in a copy (UPGRADE_ARGUMENTS=--help).
	$(BIN)/python requirements/upgrade_check.py --package '$(PACKAGE)' --version '$(VERSION)' --sets '$(SETS)' $(UPGRADE_ARGUMENTS)

bench: $(READY) ## Measures, and writes benchmarks/results.
	$(BIN)/python -m benchmarks $(BENCH_ARGUMENTS)

soak: $(READY) ## Everything at once for MINUTES=10: mixed calls, cancels, bad images, reloads; fails when something leaks.
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

chaos: $(READY) ## Kills everything at random under 1,000 jobs, three times: not one may be lost or done twice (15 min).
	$(BIN)/python -m benchmarks.chaos $(CHAOS_ARGUMENTS)

rehearse: $(READY) ## An upgrade and the way back behind Envoy, jobs going on: REHEARSE_ARGUMENTS='--old COMMIT' (10 min).
	$(BIN)/python -m benchmarks.rehearsal $(REHEARSE_ARGUMENTS)

clean: ## Removes what tools have left (not .venv).
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .demo build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

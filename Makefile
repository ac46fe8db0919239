# Everything that a newcomer or a developer runs. `make` alone, or `make help`, lists it.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PIP_ARGS ?=

bin := $(VENV)/bin
lab := $(VENV)/.installed-lab
dev := $(VENV)/.installed-dev
bench := $(VENV)/.installed-bench

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help compare test test-all lint format-check types check format bench board clean

help:  ## show this list
	@echo "make compare            train with and without SAM on real images, and say which is better"
	@echo "make test               run the tests"
	@echo
	@echo "make test-all           run the tests, those marked slow too"
	@echo "make lint               look for mistakes (ruff)"
	@echo "make format-check       is every file formatted? (ruff)"
	@echo "make types              check types (mypy) and docstrings against the code (pydoclint)"
	@echo "make check              lint, format-check and types"
	@echo "make format             format every file, and mend what ruff can mend by itself"
	@echo "make bench              measure what a step costs, beside other libraries"
	@echo "make board              every method on three tasks, as docs/methods.md shows (hours; a rerun continues)"
	@echo "make clean              remove $(VENV) and the caches; runs/ stays"
	@echo
	@echo "Each one first makes $(VENV) and installs what it needs, once. Settings:"
	@echo "  ARGS='...'            further arguments:  make compare ARGS='--epochs 5'   make test ARGS='-k restore'"
	@echo "  PYTHON=python3.12     the Python that makes $(VENV)"
	@echo "  VENV=.venv            where the environment is made"
	@echo "  WORKERS=2             test processes"
	@echo "  PIP_ARGS='...'        further options for pip install"

compare: $(lab)
	$(bin)/flatwise compare $(ARGS)

test: $(dev)
	$(bin)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: $(dev)
	$(bin)/python -m pytest -n $(WORKERS) -m "slow or not slow" $(ARGS)

lint: $(dev)
	$(bin)/ruff check .

format-check: $(dev)
	$(bin)/ruff format --check .

types: $(dev)
	$(bin)/mypy
	$(bin)/pydoclint --quiet src

check: lint format-check types

format: $(dev)
	$(bin)/ruff check --fix --exit-zero .
	$(bin)/ruff format .

bench: $(bench)
	$(bin)/python benchmarks/step_cost.py $(ARGS)

board: $(lab)
	$(bin)/python -m flatwise.lab.board $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp beside the environment: a second call installs nothing, and a change of the dependencies does.
$(lab): extras = lab
$(dev): extras = lab,dev
$(bench): extras = lab,dev,bench
$(lab) $(dev) $(bench): pyproject.toml tools/venv.sh
	@echo "Installing flatwise[$(extras)] into $(VENV) (the first time this takes some minutes)"
	@sh tools/venv.sh $(VENV) $(PYTHON) $(extras) $(PIP_ARGS)
	@touch $@

# `make demo` and `make test` work from a fresh clone with Python 3.11 or 3.12 and g++ alone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0# or the path of a wheel file, to install another build of torch
GFNODE_BUILD ?= auto
JOBS ?= 2
export GFNODE_BUILD

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED := .venv/.locked
INSTALLED := .venv/.installed-$(GFNODE_BUILD)
BUILD_INPUTS := setup.py pyproject.toml gfnode_fast/_version.py \
    $(shell find csrc build_backend -type f -not -name '*.pyc')

.PHONY: help install demo test test-slow lint format wheel lock clean

help:
	@echo "make demo       train on the shipped aspirin sample, about two minutes on two cores"
	@echo "make test       ruff, mypy and the tests that are not marked slow"
	@echo "make test-slow  the tests marked slow"
	@echo "make lint       ruff and mypy;  make format: ruff's corrections"
	@echo "make wheel      sdist, and the wheel built from it, in dist/"
	@echo "make install    .venv with the locked versions and the extension (all of the above do it)"
	@echo "make lock       resolve requirements/dev.in into requirements/dev.txt"
	@echo "make clean      remove what was built, .venv included"

install: $(INSTALLED)

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' \
	        2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; \
	echo "make: needs Python 3.11 or 3.12 with venv; name one with PYTHON=/path/to/python" >&2; exit 1

$(LOCKED): requirements/dev.txt | $(BIN)/python
	$(PIP) install --quiet --no-deps -r requirements/dev.txt
	$(PIP) install --quiet '$(TORCH)'
	touch $@

$(INSTALLED): $(LOCKED) $(BUILD_INPUTS)
	rm -f .venv/.installed-*
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install
	$(BIN)/gfnode-fast demo

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10 -m "not slow"

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10 -m slow

wheel: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation

lock:
	$(BIN)/python -m venv --clear .venv/lock
	.venv/lock/bin/python -m pip install --quiet '$(TORCH)'
	.venv/lock/bin/python -m pip install --quiet --upgrade -r requirements/dev.in
	{ echo '# Exact development versions, installed with --no-deps; made by `make lock` from dev.in.'; \
	  .venv/lock/bin/python -m pip freeze --all | grep -vE '^(torch|pip)(==| @)'; } > requirements/dev.txt
	rm -rf .venv/lock

clean:
	rm -rf .venv build dist *.egg-info gfnode_fast/_C*.so gfnode_fast/_build.json

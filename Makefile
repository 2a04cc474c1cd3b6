# make demo | smollm2 | test | test-all | lint | notebooks | docs | clean. Needs Python 3.11 or newer and the package index, nothing else.
SHELL := /bin/sh
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# the newest of these that is 3.11 or newer and can make a virtual environment
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help demo smollm2 test test-all lint notebooks docs page-check clean

help:
	@echo "make demo   install and run the embedded study; prints the path of its report"
	@echo "make smollm2   fetch a language model of 135 million parameters and sweep ml-100k with it,"
	@echo "            or a log of yours: DATA=path/to/log"
	@echo "make test   install and run the tests, without the slow ones (ARGS='-k name' selects)"
	@echo "make test-all   all tests: every family, every notebook, long runs"
	@echo "make lint   ruff, mypy --strict, the direction of imports"
	@echo "make notebooks  run the notebooks and keep their outputs"
	@echo "make docs   the documentation as a site, in build/docs"
	@echo "make page-check RUN=runs/demo  its report in a browser (needs npm and Chromium)"
	@echo "make clean  remove .venv, caches and builds; runs/ stays"

demo: $(VENV)/.runtime
	$(BIN)/depthprobe sweep $(ARGS)

DATA ?= ml-100k
smollm2: $(VENV)/.runtime
	test -d build/smollm2 || $(BIN)/python analyses/real_llm/smollm2.py build/smollm2
	$(BIN)/depthprobe sweep analyses/real_llm/quick.toml --data $(DATA) $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the outputs that are read on the web; the tests run the scripts beside them
notebooks: $(VENV)/.dev
	$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

# the pages that follow from the code first; a link that leads nowhere is an error
docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs
	@echo build/docs/docs/index.html

# no part of the tests: a bare machine has neither npm nor a browser
RUN ?= runs/demo
page-check:
	npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/report/page
	node tests/report/page/check.mjs $(RUN)/report.html

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv on the PATH;" \
		"install one (Debian: python3 and python3-venv) or name it: make PYTHON=/path/to/python3"; \
		exit 2; } >&2
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: PYTHON: expected Python 3.11 or newer, got '$(PYTHON)'" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)

# the stamps are as new as the last installation, so that a second call installs nothing
$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.runtime $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(VENV)/.runtime $@

# Each target does its own set-up: a virtual environment in .venv with the versions that
# constraints.txt names, installed once and again when it or pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo test lint freeze clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

demo: .venv/installed-demo  ## read some printed pages on this machine's CPU
	$(BIN)/python -m jobs.demo

test: .venv/installed-test  ## run the tests
	$(BIN)/python -m pytest

lint: .venv/installed-dev  ## check style, types and imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

freeze: .venv/installed-dev  ## write the versions installed here to constraints.txt
	(grep '^#' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//') \
	    > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove the environment and all that was made here
	rm -rf .venv demo-output build *.egg-info .pytest_cache .ruff_cache .hypothesis

# .venv/installed-demo holds when the extra `demo` of pyproject.toml is installed.
.venv/installed-%: pyproject.toml constraints.txt | .venv
	@echo "Installing vl01-batch[$*] into .venv; the first time takes some minutes."
	@$(BIN)/python -m pip install --progress-bar off --constraint constraints.txt \
	    --editable '.[$*]' | awk '/^(Collecting|Installing|Successfully)/ {print substr($$0, 1, 100); fflush()}'
	@touch $@

.venv:
	$(PYTHON) -m venv .venv

# Every target makes a virtual environment in .venv from the project's own files, then runs the plain command.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc bidfmkd_fast -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.py')

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(BIN)/bidfmkd demo

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# Everything on one and two threads takes half an hour; for a part: make bench BENCH="--cases 'perturb/*' --threads 1"
bench: .venv/installed
	$(BIN)/python benchmarks/bench.py $(BENCH)

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The constraints hold for the build's own environment too.
.venv/installed: .venv/bin/python $(SOURCES)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check ".[dev]"
	touch $@

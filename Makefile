# Each target first makes the virtual environment .venv from the project's own files, and installs the
# package into it again when a source file has changed. Then it runs one plain command.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc bidfmkd_fast -name '*.cpp' -o -name '*.cu*' -o -name '*.h' -o -name '*.py')

.PHONY: demo test lint docs bench release-check clean

demo: .venv/installed
	$(BIN)/bidfmkd demo

test: .venv/installed
	$(BIN)/pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

# The site in build/docs. Warnings are errors, the notebooks run, and links inside must lead somewhere
# (those to other hosts are not tried, since the build has no network).
docs: .venv/installed
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -D nb_execution_mode=off -b linkcheck docs build/linkcheck

# Times all cases on one and two threads, which takes half an hour. For a part of them:
#   make bench BENCH="--cases 'perturb/*' --threads 1"
bench: .venv/installed
	$(BIN)/python benchmarks/bench.py $(BENCH)

# Says for each thing that a release needs whether it is so; see CHANGELOG.md.
release-check: .venv/installed
	$(BIN)/python tools/release_check.py

clean:
	rm -rf .venv build

.venv/bin/python:
	$(PYTHON) -m venv .venv

# PIP_CONSTRAINT applies the constraints also to the isolated environment of the build.
.venv/installed: .venv/bin/python $(SOURCES)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check ".[dev]"
	touch $@

# One environment for everything: `make demo` runs the main job, `make test` the whole suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Two at a time: the quick tests need one core each, the slow ones wait for processes, hosts and time-outs half of theirs.
PYTEST := $(BIN)/python -m pytest tests -n 2 --dist loadfile
READY := $(VENV)/.ready

.PHONY: demo test test-fast cluster-packages lint clean

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" finemask recipe quickstart

test: lint test-fast
	$(PYTEST) -m slow --durations 10

test-fast: $(READY)
	$(PYTEST) -m "not slow"

# sshd, pdsh, Slurm, ...: what the tests on hosts of their own need beside root.
cluster-packages:
	tests/cluster/packages.sh

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by its exact version: asked for in a range, a registry may send a build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 "setuptools>=77" wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# Not runs/, which may hold days of work.
clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache

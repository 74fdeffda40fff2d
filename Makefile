# make venv   the environment: pinned packages and the compiled extension, in .venv
# make test   the whole suite (sets the environment up first)
# make demo   from nothing to a tiny model trained with SynPO, beside DPO, and a report; 4 to 5 minutes on 2 cores (DEMO_ARGS="--seed 1")
# make demo-loss  the fused SynPO loss beside eager torch, on this machine as it is
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
PACKAGES := .[dev,gpu,trl,train,dali,pairs]
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TEST_ARGS ?=
DEMO_ARGS ?=
# One worker a core and one thread a worker: small tests on several threads spend their time waiting for each other.
TEST_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 8 ? 8 : n)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations=10

.PHONY: help venv test test-heavy demo demo-loss lint types format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(READY)

# Without an NVIDIA GPU the CPU build of torch is asked for by name; where no index offers one, the plain build does as well.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing pinned packages (the first time takes some minutes)"
	@$(PIP) install --quiet --constraint constraints.txt setuptools wheel ninja numpy
	@if [ "$(HAS_GPU)" = 0 ]; then \
	  $(PIP) install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { echo "No index offers the CPU build of torch $(TORCH): installing the plain one, which is larger"; \
	    $(PIP) install --quiet --constraint constraints.txt torch; }; \
	else $(PIP) install --quiet --constraint constraints.txt torch; fi
	@echo "Compiling csrc/ and installing the package"
	@$(PIP) install --quiet --no-build-isolation --constraint constraints.txt --editable '$(PACKAGES)'
	@$(BIN)/python -c "from synpo_fast.ops import native_library as n; print('native CPU backend:', n.why_unavailable() or 'ready')"
	@touch $(READY)

test: $(READY)
	$(PYTEST) -m "not heavy" $(TEST_ARGS)

test-heavy: $(READY)
	$(PYTEST) -m heavy $(TEST_ARGS)

demo: $(READY)
	$(BIN)/synpo-fast demo $(DEMO_ARGS)

demo-loss: $(READY)
	$(BIN)/python benchmarks/demo_loss.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info synpo_fast/*.so .pytest_cache .ruff_cache .mypy_cache

# make venv        sets up .venv: pinned packages and the compiled extension
# make test        runs the test suite (this target and most below set up .venv first)
# make test-heavy  runs the tests that take minutes each
# make demo        trains a tiny model from scratch, with SynPO and with DPO, and writes a report; 4 to 5 minutes on 2 cores (DEMO_ARGS="--seed 1")
# make demo-loss   measures the fused SynPO loss beside eager torch on this machine
# make rehearse    runs the steps of a GPU run on a simulated GPU; needs a second environment with torch for CUDA (5 GB)
# make docs        writes docs/reference.md from the docstrings, the option tables of docs/training.md and the head's tables of benchmarks/README.md; examples/*.py are run by the tests
# make lint        checks the code with ruff
# make types       checks the types with mypy
# make format      formats the code with ruff
# make clean       deletes the environments, builds and caches
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
PACKAGES := .[dev,gpu,trl,train,dali,pairs]
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TEST_ARGS ?=
REHEARSE_VENV ?= .venv-cuda
REHEARSE := $(REHEARSE_VENV)/bin/python
REHEARSE_READY := $(REHEARSE_VENV)/.ready
REHEARSE_PACKAGES := transformers peft deepspeed liger-kernel av numpy pyarrow pyyaml pytest hypothesis
# NAME=VALUE settings with which pip finds the CUDA build of torch, for machines where it chooses a CPU build by default.
CUDA_PIP_ENV ?=
DEMO_ARGS ?=
# One worker per core and one thread per worker: several threads in small tests spend their time waiting for each other.
TEST_WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 8 ? 8 : n)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --durations=10

.PHONY: help venv test test-heavy rehearse demo demo-loss docs lint types format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

venv: $(READY)

# Without an NVIDIA GPU this asks for torch's CPU build by version; if no index has it, the default build works too.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing pinned packages (the first time takes some minutes)"
	@$(PIP) install --quiet --constraint constraints.txt setuptools wheel ninja numpy
	@if [ "$(HAS_GPU)" = 0 ]; then \
	  $(PIP) install --quiet "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { echo "No index has the CPU build of torch $(TORCH): installing the default build, which is larger"; \
	    $(PIP) install --quiet --constraint constraints.txt torch; }; \
	else $(PIP) install --quiet --constraint constraints.txt torch; fi
	@echo "Compiling csrc/ and installing the package"
	@$(PIP) install --quiet --no-build-isolation --constraint constraints.txt --editable '$(PACKAGES)'
	@$(BIN)/python -c "from synpo_fast.ops import native_library as n; print('native CPU backend:', n.reason_unavailable() or 'ready')"
	@touch $(READY)

test: $(READY)
	$(PYTEST) -m "not heavy and not rehearsal" $(TEST_ARGS)

test-heavy: $(READY)
	$(PYTEST) -m heavy $(TEST_ARGS)

$(REHEARSE_READY): constraints.txt
	@test -x $(REHEARSE) || { echo "Making $(REHEARSE_VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(REHEARSE_VENV); }
	@echo "Installing torch $(TORCH) for CUDA and torchvision: about 5 GB"
	@$(CUDA_PIP_ENV) $(REHEARSE) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch torchvision
	@$(REHEARSE) -c "import sys, torch; sys.exit(torch.version.cuda is None and \
	  f'pip chose {torch.__version__}, which is not for CUDA: see CUDA_PIP_ENV in the Makefile')"
	@$(REHEARSE) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(REHEARSE_PACKAGES)
	@touch $(REHEARSE_READY)

rehearse: $(REHEARSE_READY)
	OMP_NUM_THREADS=1 $(REHEARSE) -m tests.rehearsal
	OMP_NUM_THREADS=1 $(REHEARSE) -m pytest -q tests/rehearsal/test_fake_gpu.py tests/ops/video_patches

demo: $(READY)
	$(BIN)/synpo-fast demo $(DEMO_ARGS)

demo-loss: $(READY)
	$(BIN)/python benchmarks/head/demo_loss.py

docs: $(READY)
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_options.py
	$(BIN)/python benchmarks/head/readme_table.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(REHEARSE_VENV) build dist *.egg-info synpo_fast/*.so .pytest_cache .ruff_cache .mypy_cache

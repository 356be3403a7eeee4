# radeon-stack: `make demo` trains a small model here and now; `make help` lists the rest.
PYTHON ?= python3
ARCH   ?= cpu
ROCM   ?=
KIND   ?= train
# Another base than the platform's: the stand-in where nothing can be pulled.
BASE   ?=
# Build steps' network; `host` where containers have no bridge.
BUILD_NETWORK ?= default

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
UV    := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --compile-bytecode

# A CPU build of torch that lies on disk (pip's find-links) is taken; else uv asks PyTorch's CPU index.
# Without either it would be gigabytes of CUDA packages.
FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH      := torch==2.13.0 $(if $(FIND_LINKS),,--torch-backend cpu)
comma      := ,
export UV_FIND_LINKS := $(subst $(eval) ,$(comma),$(strip $(FIND_LINKS)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint image wheels lock kernels docs figures clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## a Python environment in .venv with all that training and testing need

$(READY): pyproject.toml Makefile docker/locks/train-cpu.txt docker/locks/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import uv' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "setting up $(VENV) …"
	@$(UV) $(TORCH)
	@$(UV) --no-deps --require-hashes --requirement docker/locks/train-cpu.txt --requirement docker/locks/dev.txt
	@$(UV) --no-deps --editable .
	@touch $@

demo: setup  ## teach a 135M model a birthday on this CPU, in about two minutes
	@$(BIN)/radeon-stack run train-llama --preset demo --engine local

# What computes on one thread, or waits, goes beside what does not; containers that train compute on all, and are alone.
ALONE := tests/engine/test_docker.py
# Of the work's tests, so many that both sides end together; the kernels' go with the others.
MOVED := tests/work/test_bench.py
test: setup  ## every test this machine can run
	@$(MAKE) --no-print-directory --jobs=3 test-unit test-work test-cluster
	@$(BIN)/python -m pytest $(ALONE)

.PHONY: test-unit test-work test-cluster
test-unit:
	@$(BIN)/python -m pytest tests/unit
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(MOVED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engine --ignore=$(ALONE)

test-work:
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/work $(addprefix --ignore=,$(MOVED))

# A cluster waits more than it computes: for nodes that are missed, and jobs that are queued again.
test-cluster:
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster

# Beyond `test`, which skips them by name where that environment is not there: llama.cpp is compiled once for it.
.PHONY: test-export
test-export: setup  ## exports and serving from beginning to end, by llama.cpp and vLLM themselves: some 15 minutes
	@$(BIN)/python tools/environment.py verify
	@$(BIN)/python -m pytest tests/work/test_export_whole.py tests/work/test_serve.py

lint: setup  ## ruff, mypy, and whether the locks are made from today's inputs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/radeon-stack image lock --check
	@$(BIN)/python tools/docs.py --check

WHICH = --kind $(KIND) --arch $(ARCH) $(if $(ROCM),--rocm $(ROCM)) $(if $(BASE),--base $(BASE)) --network $(BUILD_NETWORK)

image: setup stand-in  ## an image: ARCH=cpu, or ROCM=7.1.1 ARCH=gfx1201; KIND=train or verify
	@$(BIN)/radeon-stack image build $(WHICH)

wheels: setup stand-in  ## an image's wheels into the local store: it then builds without a network
	@$(BIN)/radeon-stack image wheels $(WHICH)

# What `cpu` starts from, and what BASE=radeon-stack/stand-in:hip asks for; made once.
.PHONY: stand-in
stand-in: setup
ifeq ($(BASE),radeon-stack/stand-in:hip)
	@$(BIN)/python tools/stand_in_base.py --hip
else ifeq ($(ARCH),cpu)
	@$(BIN)/python tools/stand_in_base.py
endif

lock: setup  ## resolve packages, commits and digests anew
	@$(BIN)/radeon-stack image lock

# What is recorded and has not changed is not compiled again, but for a sample that SEED draws, else the day.
kernels: setup  ## our Triton kernels that changed, compiled for six AMD GPUs by two tritons, without a GPU; ALL=1 all, RECORD=1 keeps figures
	@$(BIN)/python tools/kernels.py --folder $(VENV)/tritons $(if $(ALL),--all) $(if $(RECORD),--record) \
	  $(if $(SEED),--seed $(SEED)) $(if $(TRITON),--triton $(TRITON)) $(if $(TARGET),--target $(TARGET))

docs: setup  ## docs/*.md from checks, known issues, error texts and audits
	@$(BIN)/python tools/docs.py

figures: setup  ## build, rebuild, push and pull, timed: benchmarks/images.json (20 minutes)
	@$(BIN)/python benchmarks/images.py

clean:  ## remove .venv and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build

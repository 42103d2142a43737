# Everything runs in .venv, which is set up on the first use of any target.
#   PYTHON=python3.12                                               another interpreter (3.10 or newer)
#   PYTEST_ARGS="-k tree"                                           arguments for pytest
#   WORKERS=4                                                       how many processes run tests, each on one thread
#   ARCHS=80,90 TRITON=3.8.0                                        what make ptx compiles for, and with

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= 2
# A CUDA build of torch, for cuda-build alone, and the toolkit that compiles for it.
TORCH_CUDA ?= torch===2.13.0
CUDA_HOME ?= /usr/local/cuda
BIN := .venv/bin
READY := .venv/.ready
# The tests of a file share fixtures and compiled graphs, so they stay in one worker; and the order of folders puts the
# longest files first, where the order of xdist, by the number of tests, would end with a build on one core.
TESTS = -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
# The definition, the reference, operations, layers, states, the step, and the rules of the house.
CORE := tests/ops tests/layers tests/states tests/kernels tests/packaging tests/bench/test_close.py
# Triton's interpreter is chosen when Triton is imported, so it takes processes of its own. make test leaves to it
# what the executor of PTX does not run anyway, which has the same tests on what is compiled for sm_80 and sm_90.
INTERPRETED = TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels tests/gpu/test_configurations.py -m interpret $(TESTS)
# On the executor of PTX: in make test what touches every kernel, dtype and kind of batch, in make ptx all.
EXECUTED = $(BIN)/python -m pytest tests/kernels tests/gpu/test_configurations.py -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
ARCHS ?= 75,80,86,89,90,120
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

.DEFAULT_GOAL := help
.PHONY: help setup check test ptx lint demo bench cuda-build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## make .venv with the tested versions and this checkout

check: lint ## lint, then the core: what the network computes, on the reference, in C++ and in Triton (2 minutes)
	$(BIN)/python -m pytest $(CORE) -m "not slow" $(TESTS)
	$(INTERPRETED)

test: lint ## lint, then every test that this machine can run: the core, builds, trainings, measurements (7 minutes)
	$(BIN)/python -m pytest $(TESTS)
	$(INTERPRETED) -m "interpret and slow"
	$(EXECUTED) --ptx 80,90 -m "ptx and not slow"

ptx: $(READY) ## every kernel, configuration and planted fault on the PTX for ARCHS, on a CPU; TRITON=3.8.0 for another release
	@test -z '$(TRITON)' || test -d .triton-$(TRITON) || $(PIP) install --no-deps --target .triton-$(TRITON) triton==$(TRITON)
	$(if $(TRITON),PYTHONPATH=.triton-$(TRITON)) $(EXECUTED) --ptx $(ARCHS) -m ptx

lint: $(READY) ## ruff, its formatting, and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: $(READY) ## train a small language model on Python's own sources
	$(BIN)/python -m bench.lm.train_lm --preset demo --data stdlib --out runs/demo

bench: $(READY) ## the quick form of the runs that compare speed and memory, and what can run here
	$(BIN)/python -m bench list
	for run in kernels decode scaling crossover memory lamemo; do $(BIN)/python -m bench $$run --quick || exit; done

cuda-build: ## compile the CUDA half for all architectures, without a GPU (about 5 GB of packages)
	@test -x .venv-cuda/bin/ninja || { $(PYTHON) -m venv .venv-cuda && \
	  .venv-cuda/bin/python -m pip --disable-pip-version-check -qq install '$(TORCH_CUDA)' numpy setuptools wheel ninja tqdm; }
	PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" CUDA_HOME=$(CUDA_HOME) .venv-cuda/bin/python -m bench.gpu.cuda_build

clean: ## remove .venv, builds and caches; results in runs/ stay
	rm -rf .venv .venv-cuda .triton-* build dist *.egg-info lmn_kernels/_C*.so lmn_kernels/_build.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes before the package, whose build looks for it.
$(READY): pyproject.toml constraints.txt setup.py lmn_kernels/_version.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'make: $(PYTHON) is not Python 3.10 or newer; name one: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: $(PYTHON) lacks venv or ensurepip; install them (Debian, Ubuntu: apt install python3-venv)'; exit 1; }
	@echo 'Setting up .venv: a few minutes, once'
	@$(PYTHON) -m venv .venv
	@$(PIP) install -r constraints.txt
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

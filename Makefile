# Every target is a line or two that also work when typed by hand.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
SOURCES = pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
CPU_TORCH = --extra-index-url https://download.pytorch.org/whl/cpu
# The CUDA module is built for the GPU at hand. Without one nothing could run it; tests compile its sources.
GPU = $(shell nvidia-smi -L 2>/dev/null)
BUILD = PYTHONWARNINGS=ignore CUDAARCHS=$(or $(CUDAARCHS),native) RTSVM_BUILD_CUDA=$(or $(RTSVM_BUILD_CUDA),$(if $(GPU),auto,off))
# Python compiles what it imports and keeps that: nothing else need be compiled. If it must not keep it, every process
# compiles torch anew, which takes seconds and 60 MB.
INSTALL = $(BUILD) $(PIP) install -q --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-sanitized test-integrations test-models bench fuzz lint dev docs dist hub-kernels clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.demo ## train a base and three experts, merge them four ways, print a table
	$(BIN)/python examples/digits_demo.py

test: $(VENV)/.dev ## run the test suite
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: test ## run the tests as well that take longest: every GPU architecture, every way to build, the tutorial
	RTSVM_TEST_ALL=1 $(BIN)/python -m pytest -n auto --dist worksteal -m exhaustive

test-sanitized: $(VENV)/.dev ## test the native code for errors of memory and races of threads, with sanitizers
	PYTHON=$(abspath $(BIN)/python) tests/sanitized.sh

test-integrations: $(VENV)/.dev ## test our backend inside other libraries, each in an environment of its own
	for host in mergekit fusion_bench peft sd_mecha; do \
	  PYTHON=$(abspath $(BIN)/python) tests/integrations/run_suite.sh $$host || exit; done

test-models: $(VENV)/.dev ## merge real models and run the results, in an environment with transformers, diffusers and PEFT
	PYTHON=$(abspath $(BIN)/python) tests/models/run.sh

bench: $(VENV)/.dev ## rtsvm bench, about two minutes; BASE=<commit>: compared with that commit, in turns; ARGS="--full ..."
	$(if $(BASE),$(BIN)/python -m benchmarks.against $(BASE),$(BIN)/rtsvm bench) $(ARGS)

fuzz: $(VENV)/.dev ## judge certificates of random spectral calls against numpy; MINUTES=10
	$(BIN)/python -m benchmarks.honesty --minutes $(or $(MINUTES),10) $(ARGS)

lint: $(VENV)/.dev ## format, lint and type checks
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files --show-diff-on-failure

dev: $(VENV)/.dev ## set up .venv with everything a developer needs

docs: $(VENV)/.dev ## build the documentation into build/site
	$(BIN)/python -m mkdocs build

dist: ## build sdist and wheel into dist/, check them, and try the wheel in a new environment without a compiler
	PYTHON=$(PYTHON) release/dist.sh

hub-kernels: ## export ops and linalg for the library kernels of Hugging Face into dist/hub-kernels
	rm -rf dist/hub-kernels
	$(PYTHON) release/export_kernels.py dist/hub-kernels

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info r_tsvm_kernels/_build_info.json r_tsvm_kernels/*.so

# A new pip finds versions three times as fast. The second try asks PyTorch's own index for the CPU build of torch, if pip
# does not find it where it looks by default.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	-$(PIP) install -q --upgrade pip
	$(INSTALL) torch 2> $(VENV)/torch.log || $(INSTALL) $(CPU_TORCH) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.demo

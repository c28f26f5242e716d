# make demo and make test need Python (3.10 or later) and make; a C++ compiler gives the fast kernels.
#   PYTHON=python3.12      the interpreter of the environment
#   TORCH=torch==2.13.0    the torch to install: a requirement or a wheel file, or
#   TORCH=system           use the one that PYTHON already has
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs sanitize torture audit quality bench kernels gpu-check triton-gate triton-parity triton-versions triton-sanitize wheel wheel-test clean

help:
	@echo "make demo      fuse the built-in scene with every method: a table and out/demo.png"
	@echo "make test      the tests"
	@echo "make large-scene  4096x4096x64 from disk to disk, killed and resumed (30 GB in ROOM)"
	@echo "make lint      formatters, linters and types"
	@echo "make format    put the sources into their format"
	@echo "make docs      the documentation, in build/docs/index.html"
	@echo "make sanitize  the C++ kernels' tests under address, undefined and thread sanitizers"
	@echo "make torture   the long profile of the reliability tests: docs/reliability.md (hours; SHARE=0.1)"
	@echo "make free-threaded  the kernels' tests in a Python without the global lock (FREE_THREADED=python3.13t)"
	@echo "make audit     known vulnerabilities of what is installed (needs a network)"
	@echo "make quality   the tables and pictures of docs/quality.md, from real scenes"
	@echo "make bench     the tables of docs/performance-cpu.md and the page out/bench.html; COMPARE=earlier.json"
	@echo "make kernels   docs/kernels.md: what the Triton kernels compile to, without a GPU"
	@echo "make gpu-check everything that needs a GPU, in eight minutes: docs/performance-gpu.md"
	@echo "make torch-gate  the compiled libraries' sources with the headers of other versions of torch (CI)"
	@echo "make triton-gate  the Triton kernels compiled for the other architectures than sm_90 (CI)"
	@echo "make triton-parity  the Triton kernels in float32 with the oldest and the newest Triton (CI)"
	@echo "make triton-versions  that in every dtype and layout, and the kernels compiled with both"
	@echo "make triton-sanitize  their parity while every address is checked"
	@echo "make cuda-gate the CUDA kernels compiled for the other architectures than sm_90; needs nvcc (CI)"
	@echo "make cuda-sanitize  the CUDA kernels' parity on the CPU, under the address sanitizer, threads in every order"
	@echo "make wheel     one audited wheel for every Python and torch, in dist/"
	@echo "make wheel-test  install it into fresh environments (WHEEL_TESTS) and test it there"
	@echo "make clean     remove the environment and everything built"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not there: name one with PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than 3.10: name another with PYTHON="; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) has no venv module: install it (python3-venv) or name another with PYTHON="; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || echo "make: no C++ compiler: fastfusion will run on its slower reference kernels"
	$(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV)

$(VENV)/torch.done: | $(BIN)/python
	$(if $(filter system,$(TORCH)),$(BIN)/python -c 'import torch',$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)')
	@touch $@

# Editable, so that only a change of the kernels or of the requirements installs again.
$(VENV)/demo.done: $(SOURCES) | $(VENV)/torch.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[io,train,plot]'
	@touch $@

$(VENV)/dev.done: $(SOURCES) | $(VENV)/torch.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/demo.done

demo: $(VENV)/demo.done
	$(BIN)/python examples/demo.py --out out/demo.png

test: $(VENV)/dev.done
	$(BIN)/python -m pytest

ROOM ?= out
.PHONY: large-scene
large-scene: $(VENV)/dev.done
	mkdir -p $(ROOM)
	$(BIN)/python -m benchmarks.large_scene --folder $(ROOM)

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/docs.done: $(VENV)/dev.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

sanitize: $(VENV)/dev.done
	$(BIN)/python -m tests.sanitize --write docs/reliability.md

SHARE ?= 1
torture: $(VENV)/dev.done
	$(BIN)/python -m tests.reliability.torture --share $(SHARE) --write docs/reliability.md

# The tool is no part of the environment that it looks over. A version is looked up without its local
# part, which the database does not know; strict: a package that could not be looked up is a failure.
audit: $(VENV)/dev.done
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	$(BIN)/python -m pip list --format freeze --exclude-editable --disable-pip-version-check | sed 's/+.*//' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --requirement build/audit/installed.txt --no-deps --disable-pip

quality: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.quality --write docs/quality.md

bench: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.report --write docs/performance-cpu.md $(if $(COMPARE),--compare $(COMPARE))

kernels: $(VENV)/dev.done
	$(BIN)/python -m benchmarks.kernels --write docs/kernels.md

# Needs no network: the environment if it is there, else PYTHON with torch and Triton in it.
gpu-check:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check

TRITONS ?= 3.6.0 3.9.0
TRITON_GATE ?= sm_90 or gfx942
# Two at a time: 100 s of one core each. `make test` compiles for sm_90.
TRITON_ARCHITECTURES ?= sm_80 sm_100 sm_120 gfx942
triton-gate: $(VENV)/dev.done
	printf '%s\n' $(TRITON_ARCHITECTURES) | FASTFUSION_TRITON_GATE=all OMP_NUM_THREADS=1 xargs -P 2 -I ARCHITECTURE \
	  $(BIN)/python -m pytest -p no:cacheprovider --timeout=0 tests/ops/test_triton.py -k "compiles and ARCHITECTURE"

# The versions run side by side; their tests take 93 s of one core with Triton 3.7.
triton-parity: $(VENV)/dev.done
	$(BIN)/python -m tests.ops.tritons $(TRITONS)

triton-versions: $(VENV)/dev.done
	$(BIN)/python -m tests.ops.tritons --full $(TRITONS)
	@set -e; for version in $(TRITONS); do \
	  $(BIN)/python -m tests.ops.tritons --fetch-only $$version; \
	  echo "Triton $$version"; \
	  PYTHONPATH=build/triton-$$version:. FASTFUSION_TRITON_GATE=all $(BIN)/python -m pytest tests/ops/test_triton.py -k "compiles and ($(TRITON_GATE))"; \
	done

triton-sanitize: $(VENV)/dev.done
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -p no:warnings -p tests.ops.bounds tests/ops/test_parity.py -k "triton and (float32 or layout)"

# An installation from source compiles against the torch that is there.
TORCHES ?= 2.10.0 2.15.0
.PHONY: torch-gate
torch-gate: $(VENV)/dev.done
	$(BIN)/python -m tests.torch_headers $(TORCHES)

# A Python without the global lock (PEP 703). Its tests are copied, so that what was installed is
# what is imported; Triton would switch the lock on again.
FREE_THREADED ?= python3.13t
FREE = build/free-threaded
.PHONY: free-threaded
free-threaded:
	rm -rf $(FREE)
	$(FREE_THREADED) -m venv $(FREE)
	$(FREE)/bin/python -m pip install --quiet --only-binary :all: torch numpy scipy 'pytest>=8' 'pytest-timeout>=2.3' 'hypothesis>=6.100' 'ninja>=1.11'
	FASTFUSION_CPP=1 FASTFUSION_CUDA=0 $(FREE)/bin/python -m pip install --quiet .
	cp -r tests csrc pyproject.toml $(FREE)
	cd $(FREE) && export PYTHON_GIL=0 && bin/python -m pytest tests/ops/test_parity.py tests/reliability/test_properties.py -k 'not triton' \
	  && FASTFUSION_TORTURE=$(SHARE) bin/python -m pytest tests/reliability/test_concurrency.py

.PHONY: cuda-gate cuda-sanitize
cuda-gate: $(VENV)/dev.done
	FASTFUSION_CUDA_GATE=all $(BIN)/python -m pytest -p no:cacheprovider --timeout=0 tests/ops/test_build_cuda.py -k "compiles and not sm_90"

cuda-sanitize: $(VENV)/dev.done
	$(BIN)/python -m pytest tests/cuda_on_cpu
	$(BIN)/python -m tests.cuda_on_cpu.sanitize

$(VENV)/release.done: $(VENV)/dev.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[release]'
	@touch $@

wheel: $(VENV)/release.done
	rm -f dist/fastfusion-*.whl
	$(BIN)/python csrc/release.py --out dist

# PYTHON:TORCH, the oldest and the newest of both. Most builds of torch bring gigabytes of CUDA
# libraries; an environment is removed after its tests.
WHEEL_TESTS ?= 3.10:2.10.0 3.11:2.13.0 3.13:2.15.0
wheel-test:
	@ls dist/fastfusion-*.whl >/dev/null 2>&1 || $(MAKE) wheel
	$(BIN)/python tests/wheel.py dist/fastfusion-*.whl --environments $(WHEEL_TESTS)

clean:
	rm -rf $(VENV) build dist out *.egg-info fastfusion/_C_*

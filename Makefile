# make demo | test | lint | bench | clean
# Each sets up .venv first where it has to; a second call starts at once.
#   PYTHON=python3.12   the interpreter .venv is made from
#   UML_CUDA=AUTO|ON|OFF   the CUDA part: built where nvcc is found, required, left out

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
export UML_CUDA ?= AUTO
TORCH := 2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu

BIN := $(CURDIR)/.venv/bin
VENV := .venv/.made
TORCH_INSTALLED := .venv/.torch-$(TORCH)
CUDA_CHOICE := .venv/.uml-cuda
INSTALLED := .venv/.installed
TOOLS := .venv/.tools
CTEST := build/ctest
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name CMakeLists.txt)
CXX_FILES := $(filter %.cpp %.h %.cu,$(NATIVE))
export PATH := $(BIN):$(PATH)

.PHONY: help demo test ctest lint bench clean force

help:
	@echo "make demo   train the two demonstration recipes and write their reports"
	@echo "make test   C++ and Python tests"
	@echo "make lint   ruff, clang-format, mypy"
	@echo "make bench  speed of the ops the training step and the loader, written to bench/results/"
	@echo "make clean  remove what was built (.venv and runs/ stay)"

# One thread: networks this small gain nothing from a second one, and lose much to busy neighbours.
demo: export OMP_NUM_THREADS = 1
demo: $(INSTALLED)
	python -m uml_fast.train gaussian
	python -m uml_fast.train
	@echo "reports: runs/gaussian/report.html and runs/numbers/report.html"

# One thread per worker: two workers with one thread each beat one worker with two.
test: ctest
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 8 --dist worksteal

# The C++ tests are of csrc/core alone, so the CUDA part is left out of their build.
ctest: $(INSTALLED) $(TOOLS)
	cmake -S . -B $(CTEST) -G Ninja -DCMAKE_BUILD_TYPE=Release -DUML_TESTS=ON -DUML_CUDA=OFF \
	  -DPython_EXECUTABLE=$(BIN)/python -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" >/dev/null
	cmake --build $(CTEST)
	ctest --test-dir $(CTEST) --output-on-failure

lint: $(INSTALLED) $(TOOLS)
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CXX_FILES)
	mypy uml_fast

bench: $(INSTALLED) $(TOOLS)
	python -m pytest bench/kernels.py
	python -m pytest bench/step.py
	python -m pytest bench/loader.py
	python -m pytest bench/grid.py bench/extract.py
	python -m pytest bench/multibench.py

clean:
	rm -rf build dist .pytest_cache .hypothesis .benchmarks .mypy_cache .ruff_cache $(INSTALLED)
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(VENV):
	$(PYTHON) -m venv .venv
	touch $@

# Without an NVIDIA GPU the CPU build is asked for by name: from the configured index or wheel
# folder, then from PyTorch's own index; where neither has it (macOS, say), the plain build is it.
$(TORCH_INSTALLED): $(VENV)
	if command -v nvidia-smi >/dev/null; then \
	  pip install --quiet "torch==$(TORCH)"; \
	else \
	  pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
	  || pip install --quiet --retries 1 --timeout 20 --extra-index-url $(CPU_WHEELS) \
	    "torch==$(TORCH)+cpu" 2>/dev/null \
	  || pip install --quiet "torch==$(TORCH)"; \
	fi
	touch $@

# Rewritten only when UML_CUDA differs from the last time, so that a change of it builds again.
$(CUDA_CHOICE): force | $(VENV)
	@[[ "$$(cat $@ 2>/dev/null)" == "$(UML_CUDA)" ]] || echo "$(UML_CUDA)" > $@

$(INSTALLED): $(TORCH_INSTALLED) $(CUDA_CHOICE) pyproject.toml CMakeLists.txt $(NATIVE)
	pip install --quiet --editable ".[demo]"
	touch $@

# The tools' requirements are read back from the installed package, so that they build nothing again.
# torch is named beside them: torchvision, which timm needs, would bring its newest one otherwise.
# DALI (265 MB, about 20 s) exists for Linux alone: where it cannot be had, its tests are skipped.
REQUIREMENTS = python -c 'import importlib.metadata as m, sys; \
  wanted = [r.split(";") for r in m.requires("uml-fast") if "extra" in r]; \
  print(*[name for name, extra in wanted if ("dali" in extra) == ("dali" in sys.argv)], sep="\n")'
$(TOOLS): pyproject.toml | $(INSTALLED)
	$(REQUIREMENTS) | pip install --quiet -r /dev/stdin "torch==$(TORCH)"
	$(REQUIREMENTS) dali | pip install --quiet -r /dev/stdin \
	  || echo "NVIDIA DALI cannot be installed here; its tests are skipped"
	touch $@

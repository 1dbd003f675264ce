# mipnerf_fast: `make demo` and `make test` do all their set-up themselves; `make help` lists everything.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Of cuda-build: an environment of its own, and a torch whose index entry comes with CUDA.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.*
# Of gpu-check: its stages, all of them by default, and the scene folder that the fast model trains on.
STAGE ?=
SCENE ?=
# More for pytest, such as ARGS="-k composite".
ARGS ?=

ifeq ($(VENV),none)
PYTHON_RUN := $(PYTHON)
else
PYTHON_RUN := $(VENV)/bin/python
endif

PIP := $(PYTHON_RUN) -m pip --disable-pip-version-check install
NATIVE_SOURCES := $(shell find csrc -type f)
PYTHON_SOURCES := $(wildcard mipnerf_fast tests benchmarks setup.py train.py)
CLANG_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(PYTHON_RUN) -c 'import clang_format; clang_format.clang_format()'

# Stamps. The first is named after what was asked of torch, so that another TORCH installs another torch. The
# last holds the interpreter it was built for; another one, or a library that is gone, makes it out of date.
TORCH_STAMP := $(VENV)/.torch-$(firstword $(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum))
INSTALL_STAMP := $(VENV)/.installed
NATIVE_STAMP := build/native.stamp
# Of a library for this processor alone, which takes a third of the time to compile: enough for the demo.
HOST_STAMP := build/native-host.stamp
BUILT_FOR := $(shell cat $(NATIVE_STAMP) 2>/dev/null)
HOST_BUILT_FOR := $(shell cat $(HOST_STAMP) 2>/dev/null)
BUILT := $(wildcard mipnerf_fast/_C*.so)

.PHONY: help setup demo test lint format clean cuda-check cuda-build gpu-check check-machine always
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@echo 'make demo    train on the built-in scene; picture strip, table and video in outputs/demo'
	@echo 'make test    every test (ARGS="-k name" for some)'
	@echo 'make lint    ruff, mypy, clang-format: what CI checks'
	@echo 'make format  let ruff and clang-format rewrite the sources'
	@echo 'make cuda-check  compile every CUDA kernel for every architecture; registers, spills, instructions (nvcc, no GPU)'
	@echo 'make cuda-build  the library with its kernels for a torch with CUDA, in build/cuda (nvcc, no GPU; gigabytes)'
	@echo 'make gpu-check   on a machine with a GPU: build for it, tests, sanitizer, verify, benchmarks, training, profile'
	@echo '                 (STAGE="verify steps" for some; SCENE=path/to/lego for the fast model to train on;'
	@echo '                 MIPNERF_FAST_REVISION=... where there is no git)'
	@echo 'make setup   only the set-up: virtual environment, torch, the package, the native library'
	@echo 'make clean   remove what was built (the virtual environment stays)'
	@echo
	@echo 'Variables: PYTHON (now $(PYTHON)), VENV (now $(VENV); none: use PYTHON as it is, install nothing),'
	@echo '  TORCH (now $(TORCH)), TORCH_INDEX (one more package index, such as one with CPU-only wheels of torch)'

# One sentence for each thing that pip or the compiler would report less clearly.
check-machine:
	@command -v $(PYTHON) >/dev/null || \
	    { echo 'make: $(PYTHON) was not found; install Python 3.10 or newer, or name one: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 or newer is needed: make PYTHON=..." >&2; exit 1; }
	@test '$(VENV)' = none || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo 'make: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    { echo 'make: $(PYTHON) has no C headers (Python.h); on Debian: apt-get install python3-dev' >&2; exit 1; }
	@test -n "$$CXX" || command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    { echo 'make: no C++ compiler was found; on Debian: apt-get install g++' >&2; exit 1; }

ifeq ($(VENV),none)
INSTALLED := check-machine
else
INSTALLED := $(INSTALL_STAMP)

# torch first and by itself: what comes after it finds its need of torch met, and fetches no other release.
$(TORCH_STAMP): | check-machine
	test -x $(PYTHON_RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch $@

$(INSTALL_STAMP): $(TORCH_STAMP) pyproject.toml setup.py
	$(PIP) 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13'
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@
endif

ifneq ($(BUILT_FOR)$(if $(BUILT),,; missing),$(PYTHON_RUN))
$(NATIVE_STAMP): always
endif
$(NATIVE_STAMP): $(filter $(INSTALL_STAMP),$(INSTALLED)) setup.py $(NATIVE_SOURCES) | check-machine
	$(PYTHON_RUN) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D)
	@rm -f $(HOST_STAMP)
	@echo $(PYTHON_RUN) >$@

ifneq ($(HOST_BUILT_FOR)$(if $(BUILT),,; missing),$(PYTHON_RUN))
$(HOST_STAMP): always
endif
$(HOST_STAMP): $(filter $(INSTALL_STAMP),$(INSTALLED)) setup.py $(NATIVE_SOURCES) | check-machine
	$(PYTHON_RUN) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D)
	@rm -f $(NATIVE_STAMP)
	@echo $(PYTHON_RUN) >$@

setup: $(INSTALLED) $(NATIVE_STAMP)

# With the library that is there, or the one that is soonest there. pip builds it too, with the package.
ifeq ($(BUILT_FOR),)
demo: export MIPNERF_FAST_VECTOR_UNITS := host
endif
demo: $(INSTALLED) $(if $(BUILT_FOR),$(NATIVE_STAMP),$(HOST_STAMP))
	$(PYTHON_RUN) benchmarks/demo.py --out outputs/demo

# Two files of tests at a time, where the interpreter can: most of the time goes into compiling and running emulated
# kernels, one after the other in a file.
test: setup
	$(PYTHON_RUN) -m pytest $$($(PYTHON_RUN) -c 'import xdist' 2>/dev/null && echo '-n 2 --dist loadfile') $(ARGS)

lint: setup
	$(PYTHON_RUN) -m ruff check $(PYTHON_SOURCES)
	$(PYTHON_RUN) -m ruff format --check $(PYTHON_SOURCES)
	$(PYTHON_RUN) -m mypy $(filter-out tests,$(PYTHON_SOURCES))
	$(CLANG_FORMAT) --dry-run -Werror $(CLANG_SOURCES)

format: setup
	$(PYTHON_RUN) -m ruff check --fix --exit-zero $(PYTHON_SOURCES)
	$(PYTHON_RUN) -m ruff format $(PYTHON_SOURCES)
	$(CLANG_FORMAT) -i $(CLANG_SOURCES)

cuda-check: $(INSTALLED)
	$(PYTHON_RUN) benchmarks/cuda_check.py $(ARGS)

# A copy of the sources and an environment of its own: a library with kernels does not load into a torch without CUDA,
# so it must not take the place of the one that `make setup` builds.
cuda-build: | check-machine
	$(PYTHON) benchmarks/cuda_build.py --venv '$(CUDA_VENV)' --torch '$(CUDA_TORCH)'

# With VENV=none the interpreter is used as it is; the library is built by the first stage, for this GPU alone.
gpu-check: $(INSTALLED)
	$(PYTHON_RUN) benchmarks/gpu_check.py --stage '$(STAGE)' $(if $(SCENE),--scene '$(SCENE)') $(ARGS)

clean:
	rm -rf build dist *.egg-info mipnerf_fast/_C*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

always:

# Everything runs in .venv, made on first use. `make help` lists the targets.

PYTHON ?= python3
# On a GPU machine, name the wheel of your CUDA version: make PADDLE="paddlepaddle-gpu==3.3.1 ..."
PADDLE ?= paddlepaddle==3.3.1
EXTRAS ?= plot,test

VENV := .venv
BIN := $(VENV)/bin
RUNS ?= runs/quickstart
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
NATIVE_SOURCES := $(shell find csrc cmake -type f) tools/build_backend.py tools/find_paddle.py \
  CMakeLists.txt setup.py pyproject.toml
CPP_FILES = $(shell git ls-files -co --exclude-standard '*.cc' '*.h' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help install pretrain test test-slow test-durations matrix lint format build docs site bench \
  gpu-check gpu-stress gpu-sanitize gpu-smoke gpu-day clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## .venv with Paddle, this package (editable) and what tests need

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.paddle: $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet setuptools $(PADDLE)
	@touch $@

$(VENV)/.installed: $(VENV)/.paddle $(NATIVE_SOURCES)
	@echo "compiling the operators (a minute or two)"
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@

pretrain: install  ## pre-train a small LLaMA on the Python standard library's source, on CPU
	$(BIN)/python -m pypkg.preprocess --input_path $(STDLIB) --file_suffix .py \
	  --exclude site-packages,dist-packages,__pycache__ --append_eos --shuffle_seed 1 \
	  --train_tokenizer 4096 --tokenizer_name_or_path $(RUNS)/tokenizer \
	  --output_prefix $(RUNS)/data/stdlib
	$(BIN)/python -m pypkg.pretrain configs/quickstart.json --output_dir $(RUNS)/checkpoints \
	  --input_dir $(RUNS)/data --tokenizer_name_or_path $(RUNS)/tokenizer

# Python keeps compiled files, or each process that a test starts compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE
# Two files at a time, since tests of several processes mostly wait; in the order of conftest.py.
PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: install  ## the tests of every push, in under ten minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: install  ## the others: compilers' output, eight processes, dry runs of the GPU tools
	$(PYTEST) -m slow

test-durations: install  ## both, and how long each file took beside tests/durations.json
	$(PYTEST) --junitxml=build/durations.xml
	$(BIN)/python tests/durations.py build/durations.xml

matrix: install  ## every model under every parallel strategy on CPU processes, page into docs/
	$(BIN)/python tests/matrix/run_matrix.py

lint: $(VENV)/.lint  ## ruff, mypy and clang-format, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --no-site-packages  # the same answer where Paddle is not installed yet
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.lint  ## rewrite the sources in the settled format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

$(VENV)/.lint: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | sed 's/", "/" "/g' | xargs printf '%s ')
	@touch $@

build: install  ## rebuild the compiled parts in place after editing csrc/

bench: install  ## operators, train step and data tools on this machine, tables into docs/benchmarks.md
	$(BIN)/python -m pypkg.bench ops --update-docs
	$(BIN)/python -m pypkg.bench train-step --update-docs
	$(BIN)/python -m pypkg.bench preprocess --update-docs
	$(BIN)/python -m pypkg.bench data-loading --update-docs

docs: install  ## regenerate the pages that are made from the code
	$(BIN)/python -m pypkg.config > docs/configuration.md
	$(BIN)/python -m pypkg.models > docs/models.md
	$(BIN)/python -m pypkg.console.troubleshooting > docs/guides/troubleshooting.md
	$(BIN)/python docs/parallelism/draw.py
	$(BIN)/python -m pypkg.bench report

site: $(VENV)/.site  ## the documentation as a site in build/site; a dead link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(VENV)/.site: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet $$(sed -n 's/^docs = \[\(.*\)\].*/\1/p' pyproject.toml | tr -d '"')
	@touch $@

# Needs a GPU, nvcc, CMake, Ninja and a Python with torch and pybind11; no Paddle, no .venv.
gpu-check:  ## build the kernels for the GPU, check them against torch, time them
	$(PYTHON) tests/gpu/tools/gpu_check.py

# Both need what gpu-check needs, and gpu-sanitize compute-sanitizer on PATH.
gpu-stress:  ## every kernel at 200 random shapes, against float64 and bit for bit from run to run
	$(PYTHON) tests/gpu/tools/stress.py

gpu-sanitize:  ## every kernel under memcheck, racecheck, synccheck and initcheck
	$(PYTHON) tests/gpu/tools/sanitize.py

# Needs GPUs and paddlepaddle-gpu: make PADDLE="paddlepaddle-gpu==3.3.1 ..." gpu-smoke
gpu-smoke: install  ## the same strategies on the GPUs present, in bfloat16 over NCCL, with a report
	$(BIN)/python tests/gpu/tools/gpu_smoke.py

# Needs what the others need; the part that trains is left out without paddlepaddle-gpu in .venv.
gpu-day:  ## all of these in turn, with one dated result; GPU_DAY="--from stress" goes on after a repair
	$(PYTHON) tests/gpu/tools/gpu_day.py $(GPU_DAY)

clean:  ## remove build products, keep .venv and runs/
	rm -rf build dist *.egg-info pypkg/_lib pypkg/_native*.so $(VENV)/.installed

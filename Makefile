# Two commands matter: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE ?= runs/demo
# One thread a process: the launcher starts as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
# Every process that a test starts would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE
# A file to a worker: what its tests share is made once. `tests/conftest.py` says which come first.
# Three workers for two cores: each waits a sixth of its time, for clocks and for other processes.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# What needs one core goes beside what waits.
MAKEFLAGS += --jobs=2

.PHONY: demo test check faults gpu docs format clean lint types fast all
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# torch first, before any other package can ask for another one; a build for CPUs is enough.
# pip would compile one file after the other; a few of others' files are no Python 3.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-compile torch
	$(INSTALL) --no-compile -e ".[dev]"
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	touch $@

demo: $(READY)
	$(BIN)/midstream demo --store $(STORE)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: lint
	$(BIN)/mypy

fast: lint
	$(PYTEST) -m "not slow"

all: lint
	$(PYTEST)

check: types fast

test: types all

# What `make test` leaves out: kills at every write, many ranks, nodes, stuck ranks.
faults: $(READY)
	$(PYTEST) --faults -m faults

# On a machine with a CUDA device, by a Python whose torch knows it: $(VENV) has torch for CPUs.
# Right, and how fast; what is done lies in build/gpu and is not done again.
MINUTES ?= 10
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --minutes $(MINUTES)

# The site in build/site; a broken link fails.
docs: $(READY)
	$(INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

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
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check faults docs format clean
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# torch first: the CPU build everywhere, before any other package can ask for another one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/midstream demo --store $(STORE)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

# What `make test` leaves out: kills at every write, many ranks, stuck ranks.
faults: $(READY)
	$(PYTEST) --faults -m faults

# The site in build/site; a broken link fails.
docs: $(READY)
	$(INSTALL) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

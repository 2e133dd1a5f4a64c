# Two commands for newcomers: `make quickstart` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell grep '^torch==' constraints.txt)
ARGS   ?=

# Two tests at once, one thread each: twice as fast on two cores as one after the other. Whoever is done first takes
# half of what the other has left. The cells of a notebook belong together, and the long notebooks start first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := -n 2 --dist worksteal -p no:nbval
CELLS  := -n 2 --dist loadfile --no-loadscope-reorder
NBVAL  := --nbval-sanitize-with tests/notebooks/sanitize.cfg
STRICT := notebooks/02_chat_templates.ipynb
LONG   := $(foreach number,00 10 07 05 09 08 06 03,$(wildcard notebooks/$(number)_*.ipynb))
LAX    := $(LONG) $(filter-out $(LONG) $(STRICT),$(wildcard notebooks/*.ipynb))

.PHONY: help setup quickstart test test-fast test-latest notebooks-refresh lint format lab notebooks clean
help:            ## list the commands
	@grep -E '^[a-z-]+: .*##' Makefile | sed -E 's/: .*## */\t/' | expand -t 20

# torch first, from its pin alone: every later requirement is then satisfied and nothing pulls a CUDA build.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "minituner needs Python 3.11 or newer; try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV) (once; two to five minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/.ready   ## the virtual environment, pinned packages, this package

quickstart: setup ## from nothing to your own assistant (ARGS="--name Ada")
	$(BIN)/minituner quickstart $(ARGS)

test: setup      ## the whole test suite, notebooks included
	$(PYTEST) $(SPREAD) $(ARGS)
	$(PYTEST) $(CELLS) $(NBVAL) --nbval-lax $(LAX)
	$(PYTEST) $(NBVAL) --nbval $(STRICT)

test-fast: setup ## no notebooks, nothing that starts commands, ranks or browsers, or takes seconds
	$(PYTEST) $(SPREAD) -m "not slow" $(ARGS)

# Newest releases but for torch, whose newest would pull another build of several gigabytes.
test-latest: ## the tests with the newest releases of everything; the lock stays as it is
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m tests.latest $(SPREAD) $(ARGS)

notebooks-refresh: setup ## run the notebooks and write their outputs back (ARGS="03 04": these)
	$(BIN)/python -m tests.notebooks.refresh $(ARGS)

lint: setup      ## ruff: style and likely mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup    ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: setup       ## JupyterLab in notebooks/
	$(BIN)/jupyter lab --notebook-dir notebooks

notebooks: setup ## stubs into the notebooks, solution notebooks beside (ARGS=folder; default work_dirs/solutions)
	$(BIN)/minituner camp solutions --renew $(or $(ARGS),work_dirs/solutions)

clean:           ## remove the environment and caches (never work_dirs/)
	rm -rf $(VENV) .venv-latest .pytest_cache .ruff_cache build dist

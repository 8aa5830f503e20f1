# One-line tasks. `make audit` and `make test` do all their own set-up (Python 3.11+ and git).
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet -c constraints.txt
JOBS ?= 2

.PHONY: help audit test lint format types docs build clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

audit: $(VENV)/.core ## audit the embedded default and write a report; options in ARGS="--data digits"
	$(BIN)/gradleak audit $(ARGS)

test: $(VENV)/.dev ## run the tests; options in ARGS="-k store"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd benchmarks && $(abspath $(BIN))/mypy --config-file ../pyproject.toml *.py
	$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## check the types alone
	$(BIN)/mypy
	cd benchmarks && $(abspath $(BIN))/mypy --config-file ../pyproject.toml *.py

docs: $(VENV)/.dev ## build the documentation into site/
	$(BIN)/mkdocs build --strict

build: $(VENV)/.core ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what tools wrote, but neither the environment nor runs/
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment too
	rm -rf $(VENV)

# A stamp file per layer: set-up runs again only when the declared dependencies change.
$(VENV)/.dev: $(VENV)/.core
	$(INSTALL) -e '.[cma,crypto,data,diffusion,dp,dev,federate]'
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(BIN)/python:
	@for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$candidate -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$candidate; the first install takes a few minutes"; \
	    exec $$candidate -m venv $(VENV); \
	  fi; \
	done; \
	echo "gradleak needs Python 3.11 or newer with its venv module, and none was found." >&2; \
	echo "Install it (Debian: apt-get install python3 python3-venv) or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

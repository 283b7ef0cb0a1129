VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format docs bench faults constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install everything into .venv (GPU or CPU, found by itself)
	@ALTER_VENV="$(abspath $(VENV))" scripts/setup.sh

demo: setup ## Train a small model, forget two domains, serve it, show the difference
	$(BIN)/alter demo

test: setup ## Run the test suite (pass options by PYTEST_ARGS=...)
	$(BIN)/pytest -n 2 $(PYTEST_ARGS)

check: setup ## Check format, lint, types and import rules
	@scripts/check.sh $(BIN)

format: setup ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: setup ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## Measure serving cost (goes on where it was interrupted)
	$(BIN)/python -m benchmarks.serving

faults: setup ## Inject thousands of faults into fleets, count what breaks (goes on where it was interrupted)
	$(BIN)/python -m benchmarks.faults

bench-%-quick: setup ## A short version of a benchmark, written to build/ (bench-tofu-quick)
	$(BIN)/python -m benchmarks.$(subst -,_,$*) --quick

bench-%: setup ## Any one benchmark, for example bench-parity
	$(BIN)/python -m benchmarks.$(subst -,_,$*)

constraints: setup ## Record the installed versions as the proven ones
	scripts/constraints.sh $(BIN)

clean: ## Remove caches and build output (keeps .venv)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

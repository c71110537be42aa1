# `make test` and `make demo` need Python 3.11 to 3.13 and make, nothing else. PYTHON chooses the interpreter.
PYTHON ?= python3.11
VENV ?= .venv
WORKDIR ?= runs/demo
DATA ?= demo_data
RUN := $(VENV)/bin/python

.PHONY: setup test lint demo clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) --version >/dev/null 2>&1 || { echo "$(PYTHON) was not found; choose an interpreter with PYTHON=python3.12 (3.11 to 3.13 work)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[demo,test]'
	@touch $@

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest -n 2

demo: setup
	$(RUN) -m tools.fetch_data --output $(DATA)
	$(RUN) -m experiments.launch --gin_file configs/recipes/demo.gin --workdir $(WORKDIR) --gin_param "Corpus.directory = '$(DATA)'"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

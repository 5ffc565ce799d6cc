# `make demo`, `make test` and `make docs` create their own environment. They need Python 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# So that Python, started beside the checkout, does not take its folder for the package.
COMPAT := --config-settings editable_mode=compat
# Where this is set, each of the many processes of the tests compiles all that it imports again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-quick test-all lint docs clean

# Offline, on a CPU: fine-tune a pretrained EfficientNet-Lite0 to classify digits, and classify a
# photograph with the pretrained network.
demo: $(VENV)/.demo
	$(BIN)/tljax train --image-size 96 --epochs 4
	$(BIN)/tljax predict $$($(BIN)/python -c "import skimage, pathlib; print(pathlib.Path(skimage.__file__).parent / 'data/chelsea.png')")

# Check style and types, then run the tests that take seconds.
test: lint test-quick

# The same tests without the checks; `make test-quick PYTHON=python3.12 VENV=.venv312` on another Python.
test-quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Also run the tests that take minutes.
test-all: $(VENV)/.test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Build the documentation, and run its notebooks (minutes).
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going docs docs/build/html

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# With --no-compile only imported modules are compiled to bytecode, when they are imported.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile $(COMPAT) --editable ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile $(COMPAT) --editable ".[demo,docs,test]"
	@# torchattacks declares old versions and torchvision, and needs neither.
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1
	@# See tests/oracles.py.
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oracles \
		timm==1.0.31 torchvision==0.28.0 peft==0.21.2 accelerate==1.15.0
	touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile $(COMPAT) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV)

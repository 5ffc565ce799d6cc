# Two commands set everything up: `make demo` and `make test`. Both need Python 3.11 or later.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-quick test-all lint clean

# The main job, offline, on a CPU: pretrained EfficientNet-Lite0 becomes a reader of digits,
# and as it is names what is on a photograph.
demo: $(VENV)/.demo
	$(BIN)/tljax train --image-size 96 --epochs 4
	$(BIN)/tljax predict $$($(BIN)/python -c "import skimage, pathlib; print(pathlib.Path(skimage.__file__).parent / 'data/chelsea.png')")

# Checks the style and the types, then runs the tests that take seconds.
test: lint test-quick

# The same without style and types; `make test-quick PYTHON=python3.12 VENV=.venv312` on another Python.
test-quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Also the tests that take minutes.
test-all: $(VENV)/.test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# With --no-compile only what is imported is compiled to bytecode, a small part of all, and then.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[demo]"
	touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[demo,test]"
	@# torchattacks asks for old versions and for torchvision, and needs neither.
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1
	touch $@

clean:
	rm -rf $(VENV)

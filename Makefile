# `make demo` and `make test` are all that a bare machine with Python >= 3.11 needs.
#   PYTHON=python3.12  the interpreter that .venv is made with
#   HIDE=torch         for test: run as if torch (or jax, or torch,jax) were not installed
# On Linux, a plain torch brings several GB of CUDA; any torch 2.13.0 that pip finds first, or that is
# already in .venv, is kept.

PYTHON ?= python3
HIDE ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test docs lint clean

demo: $(INSTALLED)
	$(BIN)/bilevel demo --backend numpy --out demo-output/
	$(BIN)/bilevel demo --backend torch --out demo-output/
	$(BIN)/bilevel demo --backend jax --out demo-output/

# One thread per test process: two processes that each start a thread per core slow each other down.
# A page's snippets build on each other, so a file stays with one process.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 BILEVEL_HIDE='$(HIDE)' PYTHONPATH='$(if $(HIDE),$(CURDIR)/.ci/hide)' \
		$(BIN)/pytest -n auto --dist loadfile

docs: $(INSTALLED)
	$(BIN)/pytest README.md docs

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bilevel needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache build dist demo-output
	find bilevel backends tests -name __pycache__ -type d -prune -exec rm -rf {} +

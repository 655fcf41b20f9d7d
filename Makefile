# `make demo` and `make test` are all that a bare machine with Python >= 3.11 needs.
#   PYTHON=python3.12  the interpreter that .venv is made with
#   TESTS=tests/demo   for the test targets: the files or folders to test, with options of pytest
#   HIDE=torch         for test: run as if torch (or jax, or torch,jax) were not installed
#   DATA=DIR           for paper: the folder with mnist/ and the like
#   BENCH=--quick      for bench: what else to tell it; see python -m benchmarks.speed --help
# On Linux, a plain torch brings several GB of CUDA; any torch 2.13.0 that pip finds first, or that is
# already in .venv, is kept.

PYTHON ?= python3
HIDE ?=
BENCH ?=
DATA ?=
TESTS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
PEERS := .venv-peers

.PHONY: demo test test-all test-oldest test-newest docs docs-site docs-site-version notebooks lint paper bench compatibility dist clean

demo: $(INSTALLED)
	$(BIN)/bilevel demo --backend numpy torch jax --out demo-output/

# One thread per test process: two processes that each start a thread per core slow each other down. Compiling is most of
# the time of the JAX tests, so compiled code is kept in .cache/jax. conftest.py divides the tests among the processes.
RUN := OMP_NUM_THREADS=1 JAX_COMPILATION_CACHE_DIR='$(CURDIR)/.cache/jax' \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# XLA optimizes little here, which takes half of its CPU time away. The tests of other versions compile as users do.
QUICK := $(RUN) JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	XLA_FLAGS='--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'

test: $(INSTALLED)
	$(QUICK) BILEVEL_HIDE='$(HIDE)' PYTHONPATH='$(if $(HIDE),$(CURDIR)/.ci/hide)' $(BIN)/pytest -n auto -m 'not slow' $(TESTS)

# Also trainings, benchmarks, builds, several processes and the systems of the paper.
test-all: $(INSTALLED)
	$(QUICK) $(BIN)/pytest -n auto $(TESTS)

# NumPy and JAX at the lowest versions of pyproject.toml, and at the newest that pip finds. PyTorch is left out: a plain
# torch of another version than the pinned one brings several GB of CUDA. `make clean` removes both environments.
test-oldest test-newest: test-%: .venv-%/.installed
	$(RUN) .venv-$*/bin/pytest -n auto $(TESTS)

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) .ci/oldest.py >.venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --constraint .venv-oldest/constraints.txt --editable '.[examples-jax,test]'
	@touch $@

.venv-newest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --upgrade --upgrade-strategy eager --editable '.[examples-jax,test]'
	@touch $@

docs: $(INSTALLED)
	$(BIN)/pytest README.md docs

# The documentation with the API reference, in site/. It needs no framework: docstrings are read from the sources.
docs-site: .venv-docs-site/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs-site/bin/mkdocs build

# Commit the site to the local branch gh-pages as a version, for example VERSION=0.2, and make it the latest. An older site
# of the same version is replaced. mike calls mkdocs by its name.
docs-site-version: .venv-docs-site/.installed
	export NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/.venv-docs-site/bin:$$PATH"; \
	mike deploy --update-aliases --alias-type redirect '$(VERSION)' latest && mike set-default latest

# Run the notebooks of docs/notebooks again, and store what they print and draw.
notebooks: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python .ci/site/notebooks.py

.venv-docs-site/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs-site
	.venv-docs-site/bin/pip install --constraint constraints.txt --editable '.[docs-site]'
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python .ci/prose.py

# Each system's runs that have no history yet, then the page of all.
paper: $(INSTALLED)
	$(if $(DATA),,$(error make paper needs DATA=DIR, the folder with mnist/ and the like; see examples/paper/data.py))
	set -e; for system in $$($(BIN)/python examples/paper/page.py --list); do \
		$(BIN)/python examples/paper/$$system.py --data '$(DATA)'; done
	$(BIN)/python examples/paper/page.py

# The libraries that are compared with have an environment of their own; those that do not install are left out.
bench: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.speed $(BENCH)

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/speed/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --constraint constraints.txt --editable '.[torch,jax,demo]'
	for peer in $$(grep -v '^#' benchmarks/speed/peers.txt); do \
		$(PEERS)/bin/pip install --constraint constraints.txt $$peer || echo "left out: $$peer"; done
	@touch $@

# The table of docs/compatibility.md: second derivatives of other packages, in an environment of their own.
compatibility: .venv-compatibility/.installed
	OMP_NUM_THREADS=1 .venv-compatibility/bin/python -m benchmarks.compatibility

.venv-compatibility/.installed: pyproject.toml constraints.txt benchmarks/compatibility/packages.txt
	$(PYTHON) -m venv .venv-compatibility
	.venv-compatibility/bin/pip install --constraint constraints.txt --editable '.[torch,jax]' \
		--requirement benchmarks/compatibility/packages.txt
	@touch $@

# The wheel and the source distribution, in dist/.
dist:
	$(PYTHON) -m venv .venv-build
	.venv-build/bin/pip install build
	rm -rf dist
	.venv-build/bin/python -m build

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bilevel needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-* .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache build dist site demo-output
	find bilevel backends tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

"""Pytest hooks for a run from the repository root: executed documentation, absent frameworks, several processes.

Every code block of README.md and docs/*.md that is marked `python` is a test. The blocks of one page share
a namespace, like the cells of a notebook. A block that needs a framework says so in a comment above it,
which the rendered page does not show:

    <!-- skip: next if(missing("torch"), reason="torch is not installed") -->
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def missing(module: str) -> bool:
    """Tell whether a module is not installed, without importing it."""
    return find_spec(module) is None


absent = [framework for framework in ("torch", "jax") if missing(framework)]
collect_ignore = [f"backends/bilevel_{framework}" for framework in absent]
trainers = {"huggingface": "transformers", "lightning": "lightning"}
collect_ignore += [f"backends/bilevel_torch/trainers/{name}.py" for name, needed in trainers.items() if missing(needed)]


# `make test HIDE=torch` names torch here.
hidden = set(os.environ.get("BILEVEL_HIDE", "").split(",")) & {"torch", "jax"}


def frameworks_of(nodeid: str) -> set[str]:
    """Return the frameworks that a test names: in its file, its class, its name or its parameters."""
    names = ("numpy", "torch", "jax")
    return {name for name in names if name in nodeid.lower() and not nodeid.startswith("docs/")}


# scikit-learn's checks of the conventions of an estimator: only NumPy, and a third of the time with a framework hidden.
CONVENTIONS = "::test_conventions_of_scikit_learn["


def unaffected(nodeid: str) -> bool:
    """Tell whether a test, or all tests of a file, cannot depend on a hidden framework."""
    named = frameworks_of(nodeid)
    return bool(hidden) and ((bool(named) and not named & hidden) or CONVENTIONS in nodeid)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of which no test would stay."""
    return True if unaffected(collection_path.relative_to(config.rootpath).as_posix()) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a framework hidden, leave out the tests that only concern the others.

    No backend imports another framework: tests/project/test_imports.py checks that. So a test of JAX or NumPy gives the
    same with and without torch. The core can give something else, because it looks for installed frameworks. So
    tests that name no framework stay: of the core, the command, the errors and the documentation. scikit-learn's checks
    are left out. The tests of the hidden framework stay too, and appear as skipped.
    """
    config.hook.pytest_deselected(items=[item for item in items if unaffected(item.nodeid)])
    items[:] = [item for item in items if not unaffected(item.nodeid)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Give each process the tests of a file and framework together, in order, the largest groups first.

    The snippets of a page share a namespace. The tests of a file share fixtures and compiled code. The file of the
    conformance suites is too large for one process: it is also divided by solver.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndFramework(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            if not path.startswith("tests/"):
                return path
            solver = test.partition("-")[0] if path.endswith("test_conformance.py") else ""
            return " ".join([path, solver, *sorted(frameworks_of(nodeid))])

    return ByFileAndFramework(config, log)


def pytest_report_header() -> list[str]:
    """Say at the top of the run which frameworks are absent."""
    return [f"{framework} is absent: what needs it is skipped" for framework in absent]


pytest_collect_file = Sybil(
    [PythonCodeBlockParser(), SkipParser()],
    filenames=["README.md"],
    pattern="docs/*.md",
    setup=lambda namespace: namespace.update(missing=missing),
).pytest()

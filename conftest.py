"""What pytest needs for a run from the repository root: executed documentation, and absent frameworks.

Every code block of README.md and docs/*.md that is marked `python` is a test. The blocks of one page share
a namespace, like the cells of a notebook. A block that needs a framework says so in a comment above it,
which the rendered page does not show:

    <!-- skip: next if(missing("torch"), reason="torch is not installed") -->
"""

from importlib.util import find_spec

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def missing(module: str) -> bool:
    """Tell whether a module is not installed, without importing it."""
    return find_spec(module) is None


absent = [framework for framework in ("torch", "jax") if missing(framework)]
collect_ignore = [f"backends/bilevel_{framework}" for framework in absent]


def pytest_report_header() -> list[str]:
    """Say at the top of the run which frameworks are absent."""
    return [f"{framework} is absent: what needs it is skipped" for framework in absent]


pytest_collect_file = Sybil(
    [PythonCodeBlockParser(), SkipParser()],
    filenames=["README.md"],
    pattern="docs/*.md",
    setup=lambda namespace: namespace.update(missing=missing),
).pytest()

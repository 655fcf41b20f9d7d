"""The benchmarks are run from the repository, not installed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Make the benchmarks importable. They set the number of threads of torch, which is restored."""
    monkeypatch.syspath_prepend(ROOT)
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch:
        torch.set_num_threads(before)

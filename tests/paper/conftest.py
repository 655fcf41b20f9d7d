"""A small run of a system of the paper."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("paper_systems")
from paper_systems import paper  # noqa: E402


def pytest_collection_modifyitems(items):
    """Mark what runs a system; test_runs.py does not."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem != "test_runs":
            item.add_marker("slow")


@pytest.fixture(scope="module")
def system(request):
    """Return the system of the paper that the file of tests is named after."""
    return paper(request.path.stem.removeprefix("test_"))


@pytest.fixture(scope="module")
def command(system, tmp_path_factory):
    return ["--fast", "--out", str(tmp_path_factory.mktemp(system.__name__))]


@pytest.fixture(scope="module")
def histories(system, command):
    return system.main(command)

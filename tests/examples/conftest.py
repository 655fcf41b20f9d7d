"""Fixtures for the tests of several examples."""

import pytest


@pytest.fixture
def one_thread():
    """Let torch compute with one thread, as the examples do. Restore the number for other tests."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

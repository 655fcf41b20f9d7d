"""The net and the hyperparameter of `torch_losses`."""

import pytest


@pytest.fixture
def net():
    from torch_losses import small_net

    return small_net()


@pytest.fixture
def decay():
    from torch_losses import new_decay

    return new_decay()

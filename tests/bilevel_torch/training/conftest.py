"""Float64 as default dtype: optimizers keep some numbers in it."""

import pytest


@pytest.fixture
def float64():
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

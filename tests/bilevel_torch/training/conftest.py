"""Float64 as default dtype: optimizers keep some numbers in it."""

import pytest
import torch


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)

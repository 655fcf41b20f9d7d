"""Hypothesis profiles (`ci` repeats exactly, `dev` explores), float64 in JAX, and the frameworks as a fixture."""

import os

import pytest
from frameworks import FRAMEWORKS, framework
from hypothesis import HealthCheck, settings

# Before jax is first imported. Tests of its default, float32, pass float32 arrays.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# No deadline: the first example pays for JAX's compilation and torch's start.
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(params=FRAMEWORKS, scope="session")
def backend(request):
    return framework(request.param)

"""Hypothesis profiles, float64 in JAX, and the frameworks as a fixture.

Examples repeat exactly; HYPOTHESIS_PROFILE=explore draws new ones.
"""

import os
import sys
from pathlib import Path

import pytest
from frameworks import FRAMEWORKS, framework
from hypothesis import HealthCheck, settings

# Before jax is first imported. Tests of its default, float32, pass float32 arrays.
os.environ.setdefault("JAX_ENABLE_X64", "1")

# No deadline: the first example pays for JAX's compilation and torch's start.
settings.register_profile(
    "repeat",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "repeat")
settings.load_profile(PROFILE)
HERE = Path(__file__).parent
FEW = 3 if PROFILE == "repeat" else 100  # examples in JAX

collect_ignore = [
    "helpers",  # imported by the tests, some run by them in processes
    "thirdparty",  # a separate distribution: project/test_thirdparty.py runs its tests
]


def pytest_collection_modifyitems(items):
    """Ignore one warning: most tests compare derivatives at any params, not at a solution of the inner problem."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings("ignore::bilevel.InnerProblemWarning"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Draw fewer examples for JAX, which compiles each. NumPy runs the same arithmetic with all examples."""
    test = getattr(item, "obj", None)
    test = getattr(test, "__func__", test)
    drawn = getattr(test, "_hypothesis_internal_use_settings", None)
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    if drawn is None or "jax" not in parameters:
        return (yield)
    test._hypothesis_internal_use_settings = settings(drawn, max_examples=min(FEW, drawn.max_examples))
    try:
        return (yield)
    finally:
        test._hypothesis_internal_use_settings = drawn


@pytest.fixture(params=FRAMEWORKS, scope="session")
def backend(request):
    return framework(request.param)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_code():
    """Free what JAX has compiled for a file: a process that keeps it all runs out of memory maps, and XLA crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()

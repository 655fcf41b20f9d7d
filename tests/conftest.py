"""Hypothesis profiles, float64 in JAX, the frameworks as a fixture, and a small run of a system of the paper.

Examples repeat exactly; HYPOTHESIS_PROFILE=explore draws new ones.
"""

import os
import sys

import pytest
from frameworks import FRAMEWORKS, framework
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("paper_systems")
from paper_systems import paper  # noqa: E402

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
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

collect_ignore = [
    "thirdparty",  # a distribution of its own: test_thirdparty.py runs its tests
    "ranks.py",  # run by test_torch_ddp.py, as processes
    "eight_devices.py",  # run by test_jax_sharding.py, likewise
]


@pytest.fixture(params=FRAMEWORKS, scope="session")
def backend(request):
    return framework(request.param)


@pytest.fixture(scope="module")
def system(request):
    """Return the system of the paper that the file of tests is named after."""
    return paper(request.path.stem.removeprefix("test_paper_"))


@pytest.fixture(scope="module")
def command(system, tmp_path_factory):
    return ["--fast", "--out", str(tmp_path_factory.mktemp(system.__name__))]


@pytest.fixture(scope="module")
def histories(system, command):
    return system.main(command)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_code():
    """Free what JAX has compiled for a file: a process that keeps it all runs out of memory maps, and XLA crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()

"""Who imports whom: `import bilevel` stays light, and the import contracts of pyproject.toml hold."""

import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = {"torch", "jax", "sklearn", "matplotlib", "tqdm", "hypothesis", "pytest"}
ROOT = Path(__file__).parents[2]


def loaded_by(module):
    """The modules that a fresh interpreter has loaded after `import module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["bilevel", "bilevel_numpy"])
def test_importing_the_core_loads_no_extra(module):
    assert loaded_by(module).isdisjoint(EXTRAS)


def test_the_slow_parts_of_scipy_load_at_their_first_use():
    assert loaded_by("bilevel").isdisjoint({"scipy.optimize", "scipy.special", "scipy.linalg"})


@pytest.mark.parametrize(("framework", "other"), [("torch", "jax"), ("jax", "torch")])
def test_a_framework_backend_loads_no_other_framework(framework, other):
    pytest.importorskip(framework)
    assert other not in loaded_by(f"bilevel_{framework}")


def test_the_torch_backend_loads_no_trainer_and_no_picture():
    pytest.importorskip("torch")
    assert loaded_by("bilevel_torch, bilevel_torch.data").isdisjoint({"transformers", "lightning", "matplotlib"})


def test_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

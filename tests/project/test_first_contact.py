"""The first steps of a new user: the version, the command as a module, and a backend without its framework."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bilevel as bl

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]


def python(*arguments, **environment):
    """Run a fresh interpreter and return what it did."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def without(framework):
    """Return the environment of a process in which the framework looks not installed."""
    return {
        "BILEVEL_HIDE": framework,
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".ci" / "hide"), os.environ.get("PYTHONPATH", "")]),
    }


def test_the_package_has_the_version_of_the_project():
    assert bl.__version__ == VERSION


def test_the_command_runs_as_a_module():
    done = python("-m", "bilevel", "--version")
    assert (done.returncode, done.stdout) == (0, f"bilevel {VERSION}\n"), done.stderr


def test_the_module_passes_on_the_exit_code():
    assert python("-m", "bilevel", "demo", "--backend", "none").returncode == 2


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_backend_without_its_framework_names_the_command_that_installs_it(framework):
    done = python("-c", f"import bilevel_{framework}", **without(framework))
    assert f'pip install "bilevel[{framework}]"' in done.stderr.splitlines()[-1]
    assert done.returncode == 1


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_backend_without_its_framework_counts_as_not_found(framework):
    catch = f"try:\n    import bilevel_{framework}\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert python("-c", catch, **without(framework)).stdout == f"{framework}\n"

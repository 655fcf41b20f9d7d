"""A distribution of someone else's, with a backend and a solver: found by its entry points, held to the suites."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy
from zipfile import ZipFile

import pytest

THEIRS = Path(__file__).parents[1] / "thirdparty"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python in a process that has the distribution on its path, as if it were installed; return its output."""
    root = tmp_path_factory.mktemp("thirdparty")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root), str(THEIRS)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(root / "site")
    path = os.pathsep.join(filter(None, [str(root / "site"), os.environ.get("PYTHONPATH")]))

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_entry_points_make_it_known_by_name(python):
    code = """
import bilevel as bl, boxed, numpy as np
assert "chebyshev" in bl.list_solvers() and "boxed" in bl.list_backends()
print(bl.get_solver({"name": "chebyshev", "maxiter": 3}, rtol=0.1))
problem = bl.problems.quadratic(*map(boxed.Array, (np.diag([1.0, 4.0]), np.eye(2), np.ones(2))))
w = boxed.Array(np.zeros(2))  # whose backend is found by its type
grad = bl.hypergradient(problem, w, w * 1, solver="chebyshev").grad
print(type(grad).__name__, grad.data.round(4))
"""
    solver, grad = python("-c", code).splitlines()
    assert solver == "Chebyshev(smallest=0.1, largest=10.0, maxiter=3, rtol=0.1, damping=0.0)"
    assert grad == "Array [-1.   -0.25]"


def test_the_command_shows_it(python):
    lines = python("-c", "from bilevel.cli import main; main(['info'])").splitlines()
    assert any(line.split() == ["boxed", "on", "a", "box"] for line in lines)
    assert "  chebyshev Solve (H + damping I) v = b without an inner product" in "\n".join(lines)
    assert any("smallest=0.1, largest=10.0" in line for line in lines)


def test_it_passes_the_suites(python, tmp_path):
    suite = copy(THEIRS / "test_boxed.py", tmp_path / "test_theirs.py")
    options = ["-q", "-rs", "-W", "error", "-p", "no:cacheprovider", "--color=no", "--rootdir", tmp_path]
    said = python("-m", "pytest", *options, suite)
    assert "inner_cut_off-boxed is excused: objectives bring their own gradients" in said
    assert " passed, 2 skipped" in said.splitlines()[-1]

"""The wheel is what users get: four typed import packages, three dependencies, plugins by entry point."""

import email
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
DIST_INFO = f"bilevel-{VERSION}.dist-info"
PACKAGES = {"bilevel", "bilevel_numpy", "bilevel_torch", "bilevel_jax"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = out.iterdir()
    with ZipFile(path) as archive:
        yield archive


def entry_points(wheel, group):
    parser = ConfigParser(delimiters=("=",))
    parser.read_string(wheel.read(f"{DIST_INFO}/entry_points.txt").decode())
    return {name: EntryPoint(name, value, group) for name, value in parser[group].items()}


def test_wheel_holds_the_four_packages_and_nothing_else(wheel):
    assert {PurePosixPath(name).parts[0] for name in wheel.namelist()} == PACKAGES | {DIST_INFO}


def test_every_package_is_typed(wheel):
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_core_requires_only_numpy_scipy_and_typing_extensions(wheel):
    metadata = email.message_from_bytes(wheel.read(f"{DIST_INFO}/METADATA"))
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    core = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert core == {"numpy", "scipy", "typing-extensions"}


def test_backends_are_entry_points_into_packages_of_the_wheel(wheel):
    backends = entry_points(wheel, "bilevel.backends")
    assert {name: ep.value for name, ep in backends.items()} == {
        name: f"bilevel_{name}:backend" for name in ("numpy", "torch", "jax")
    }


def test_every_solver_entry_point_loads_a_public_class(wheel):
    import bilevel

    for entry_point in entry_points(wheel, "bilevel.solvers").values():
        assert entry_point.load() is getattr(bilevel, entry_point.attr)


def test_command_is_an_entry_point_that_loads(wheel):
    assert callable(entry_points(wheel, "console_scripts")["bilevel"].load())

"""Make solvers and backends from names, mappings and TOML files. Entry points list the installed ones."""

import dataclasses
import importlib.util
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.backend import Backend
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.messages import suggest
from bilevel.methods.method import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

KRONECKER = {"kfac", "ekfac", "kronecker"}
WITHOUT_KRONECKER = (
    " Kronecker factors were measured and left out: on networks, CG took as many steps with them as without, or more. "
    'Use "nystrom" (bl.NystromPreconditioner).'
)


@cache
def _plugins(group: str) -> "dict[str, EntryPoint]":
    from importlib.metadata import entry_points  # slow to import

    return {entry.name: entry for entry in entry_points(group=group)}


def list_solvers() -> list[str]:
    """Return the names of the installed solvers.

    >>> "cg" in list_solvers()
    True
    """
    return sorted(_plugins("bilevel.solvers"))


def list_backends() -> list[str]:
    """Return the names of the backends whose framework is installed.

    >>> "numpy" in list_backends()
    True
    """
    return sorted(name for name in _plugins("bilevel.backends") if importlib.util.find_spec(name) is not None)


def list_preconditioners() -> list[str]:
    """Return the names of the installed preconditioners, for the option ``preconditioner`` of solvers."""
    return sorted(_plugins("bilevel.preconditioners"))


def get_solver(spec: object, **overrides: object) -> LinearSolver[Any] | Method:
    """Return a solver.

    Args:
        spec: a name (``"cg"``), a mapping (``{"name": "cg", "maxiter": 20}``), a ``pathlib.Path`` or string
            ending in ``.toml`` to a file with a table ``[solver]``, or a solver object. A ``preconditioner`` among the
            options is also a name, a mapping or an object. An option "none" is None, which TOML cannot write.
        **overrides: options that take precedence.

    Raises:
        ValueError: if the name is unknown or an option is out of range.
        TypeError: if an option is unknown or has a wrong type, or if spec has another type.
        OSError: if the file cannot be read. Errors about its content name the file.

    >>> get_solver({"name": "cg", "maxiter": 20}, rtol=1e-8)
    CG(maxiter=20, rtol=1e-08, atol=0.0, damping='auto', preconditioner=None)
    """
    if isinstance(spec, Path) or (isinstance(spec, str) and spec.endswith(".toml")):
        table = _read_toml(Path(spec))
        try:
            return get_solver(table, **overrides)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{spec}: {error}") from error
    if isinstance(spec, str) and spec.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"solver: {spec!r} is no TOML file. Load other formats, and pass the mapping.")
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, Mapping):
        return _make("solver", {**spec, **overrides}, 'cg", "maxiter": 20')
    if isinstance(spec, type) and issubclass(spec, LinearSolver | Method):
        name = f"bl.{spec.__name__}" if spec.__module__.partition(".")[0] == "bilevel" else spec.__name__
        raise TypeError(f"solver: expected an object, got the class {spec.__name__}. Call it: {name}().")
    if not isinstance(spec, LinearSolver | Method):
        raise TypeError(
            "solver: expected a name, a mapping, a TOML file, or an object that subclasses bl.LinearSolver, got "
            f"{spec!r:.200}. Convert a namespace or a dataclass by vars()."
        )
    if overrides:
        if not dataclasses.is_dataclass(spec):
            raise TypeError(f"solver: the options of a {type(spec).__name__} cannot be changed: make a new one.")
        _check_options("solver", type(spec).__name__, type(spec), overrides)
        return dataclasses.replace(spec, **_nested(overrides))  # pyright: ignore[reportArgumentType, reportReturnType]
    return spec


def get_linear_solver(spec: object, user: str) -> LinearSolver[Any]:
    """Return a linear solver, or raise an error that names its user. Arguments and errors are as in `get_solver`."""
    solver = get_solver(spec)
    if not isinstance(solver, LinearSolver):
        raise TypeError(
            f"{user} needs a linear solver, such as cg, minres or neumann. {solver.name} runs inner steps and needs "
            "the problem: use bl.hypergradient."
        )
    return solver


def _make(kind: str, spec: Mapping[str, object], example: str) -> Any:
    """Return the solver or preconditioner of a name and options."""
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'{kind}: the mapping {dict(spec)!r} has no name, as in {{"name": "{example}}}.')
    plugins = _plugins(f"bilevel.{kind}s")
    if name not in plugins:
        reason = WITHOUT_KRONECKER if kind == "preconditioner" and name.lower() in KRONECKER else ""
        raise ValueError(f"{kind}: there is no {name!r}.{reason}" + suggest(name, plugins))
    make = plugins[name].load()
    _check_options(kind, name, make, options)
    return make(**_nested(options))


def _nested(options: Mapping[str, object]) -> dict[str, Any]:
    """Replace "none" by None, and make the preconditioner if the option is a name or a mapping."""
    values = {key: None if value == "none" else value for key, value in options.items()}
    spec = values.get("preconditioner")
    if isinstance(spec, str):
        spec = {"name": spec}
    if isinstance(spec, Mapping):
        values["preconditioner"] = _make("preconditioner", spec, 'nystrom", "rank": 20')
    return values


def _read_toml(path: Path) -> Mapping[str, object]:
    content = path.read_bytes()
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"))  # some editors write a byte order mark
    except ValueError as error:  # wrong syntax or encoding
        raise ValueError(f"{path}: this is not TOML: {error}.") from error
    table = tables.get("solver")
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a table [solver] with a name and options.")
    if "preconditioner" in tables:
        raise ValueError(f"{path}: [preconditioner] belongs to the solver: write [solver.preconditioner].")
    return table


def solver_options(make: type) -> dict[str, Any]:
    """Return the options of a solver with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(make)} if dataclasses.is_dataclass(make) else {}


def _check_options(kind: str, name: str, make: type, options: Mapping[str, object]) -> None:
    known = solver_options(make)
    for option in options:
        if option not in known and dataclasses.is_dataclass(make):
            raise TypeError(f"{kind} {name!r} has no option {option!r}." + suggest(option, known))


def get_backend(spec: object) -> Backend:
    """Return a backend by name, or the given backend object.

    Raises:
        ValueError: if the name is unknown.
        TypeError: if spec is neither a name nor a backend.
        ImportError: if the framework is not installed, with the command that installs it.
    """
    if isinstance(spec, Backend):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"backend: expected a name or an object that subclasses bilevel.backend.Backend, got {spec!r}.")
    plugins = _plugins("bilevel.backends")
    if spec not in plugins:
        raise ValueError(f"backend: there is no {spec!r}." + suggest(spec, plugins))
    return _load_backend(spec)


@cache
def _load_backend(name: str) -> Backend:
    try:
        return _plugins("bilevel.backends")[name].load()
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != name:
            raise
        raise ImportError(
            f'The {name} backend needs {name}, which is not installed: pip install "bilevel[{name}]".'
        ) from error


def imported_backends() -> list[Backend]:
    """Return the backends whose framework is imported. Arrays cannot belong to other frameworks."""
    return [_load_backend(name) for name in _plugins("bilevel.backends") if name in sys.modules]

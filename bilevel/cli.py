"""The `bilevel` command: `info`, `version`, `diagnose`, and `demo`, an example on real data."""

import argparse
import dataclasses
import importlib.util
import inspect
import os
import platform
import sys
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from bilevel.config import get_backend, get_solver, solver_options
from bilevel.errors import SolverError
from bilevel.linear_solvers import CG
from bilevel.messages import suggest

EXAMPLES = """\
examples:
  bilevel info                             what is installed, and what a config of a solver may contain
  bilevel demo --backend numpy torch jax   tune up to 19,210 penalties, with a table and pictures
  bilevel diagnose train.py:check          is the hypergradient of my problem right?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 for findings, and 2 for invalid input, with the error on stderr.

    If a signal ends the command, the code is 128 plus its number, as in shells. A reader that closes the pipe, such as
    ``head``, counts as a signal.
    """
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()  # here, because an error at the exit of Python could not be caught
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest there at its exit
        return 141
    except (ValueError, ImportError, OSError, SyntaxError, SolverError) as error:
        print(f"bilevel: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel",
        description="Hypergradients by implicit differentiation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bilevel {version('bilevel')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    info = commands.add_parser("info", help="show backends, devices, and solvers with their options")
    info.set_defaults(run=_info)
    commands.add_parser("version", help="show the version").set_defaults(run=_version)

    diagnose = commands.add_parser(
        "diagnose",
        help="check a hypergradient of your own problem",
        description="Print the report of bilevel.diagnose on your problem: its errors, their causes, and remedies. The "
        "exit code is 1 if there are findings.",
        epilog="example: the file train.py defines  def check(): return {'problem': problem, 'params': weights, "
        "'hparams': decay, 'inner_args': (x, y), 'outer_args': (x_val, y_val)}.  Then run: bilevel diagnose "
        "train.py:check",
    )
    diagnose.add_argument(
        "target",
        metavar="FILE.py:FUNCTION",
        help="a function that returns the arguments of bilevel.diagnose as a dict; MODULE:FUNCTION works too",
    )
    diagnose.set_defaults(run=_diagnose)

    demo = commands.add_parser(
        "demo",
        help="tune a penalty for every weight of a classifier of digits",
        description="Tune a penalty for every weight of a classifier of scikit-learn's digits, by implicit "
        "differentiation: softmax regression with the numpy backend, a small network with any other.",
    )
    demo.add_argument(
        "--backend",
        nargs="+",
        default=["numpy"],
        metavar="NAME",
        help="numpy (the default), torch or jax; several run one after the other, with a summary",
    )
    solver = demo.add_mutually_exclusive_group()
    solver.add_argument("--solver", metavar="NAME", help="see bilevel info; default: CG with options for the model")
    solver.add_argument("--config", metavar="FILE.toml", help="a file with a table [solver]: its name and options")
    demo.add_argument(
        "--set",
        dest="options",
        metavar="KEY=VALUE",
        type=_option,
        action="append",
        default=[],
        help="an option of the solver, its value as in TOML; may be repeated",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the data split and the initial weights (0)")
    demo.add_argument("--out", metavar="DIR", type=Path, default=Path(), help="folder for the picture (here)")
    demo.set_defaults(run=_demo)
    return parser


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, as in rtol=1e-6, got {text!r}")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # a word without quotes, as in step_size=auto


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> None:
    from bilevel.demo import demo, summary  # slow to import, and not needed for `bilevel info`

    solver = arguments.solver if arguments.config is None else Path(arguments.config)
    options = dict(arguments.options)
    try:
        get_solver(solver or CG(), **options)
    except TypeError as error:  # a wrong option; elsewhere, a TypeError is a bug
        hint = "" if solver else " This is the demo's default solver. Choose another one, such as --solver neumann."
        raise ValueError(f"{error}{hint}") from error
    for name in arguments.backend:
        get_backend(name)  # a wrong name ends the command before the first run
    runs = [demo(name, solver, options, arguments.seed, arguments.out) for name in arguments.backend]
    if len(runs) > 1:
        print(summary(runs))


def _diagnose(arguments: argparse.Namespace) -> int:
    from bilevel.diagnosis import diagnose

    function = _function(arguments.target)
    try:
        call = function()
    except Exception as error:
        return _traceback(error)
    if not isinstance(call, Mapping) or not {"problem", "params", "hparams"} <= set(call):
        raise ValueError(
            f"{arguments.target}: expected a dict with problem, params and hparams, and perhaps inner_args, outer_args "
            f"and solver, got {sorted(call) if isinstance(call, Mapping) else type(call).__name__}."
        )
    known = list(inspect.signature(diagnose).parameters)
    for key in call:
        if key not in known:
            raise ValueError(f"{arguments.target}: bilevel.diagnose has no argument {key!r}.{suggest(key, known)}")
    try:
        report = diagnose(**call)
    except Exception as error:
        return _traceback(error)
    print(report)
    return 0 if report.ok else 1


def _traceback(error: Exception) -> int:
    """Print where the user's code failed, and return the exit code for invalid input."""
    if isinstance(error, BrokenPipeError):  # the code prints, and nothing reads it
        raise error
    traceback.print_exception(error)
    return 2


def _function(target: str) -> Callable[[], Any]:
    """Return the function that a command line names. Modules are found from the file's or the current folder."""
    place, _, name = target.rpartition(":")
    if not (place and name):
        raise ValueError(f"expected FILE.py:FUNCTION or MODULE:FUNCTION, got {target!r}.")
    path = Path(place)
    is_file = path.suffix == ".py"
    sys.path.insert(0, str(path.parent if is_file else Path()))
    module = _loaded(path) if is_file else importlib.import_module(place)
    if not callable(function := getattr(module, name, None)):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{place} has no function {name!r}.{suggest(name, functions)}")
    return function


def _loaded(path: Path) -> Any:
    """Return the module of a file. Its name may be the name of another module, such as random.py."""
    path.stat()  # a missing file is an OSError that names it
    name = path.stem if path.stem not in sys.modules else f"{path.stem} of bilevel diagnose"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _version(arguments: argparse.Namespace) -> None:
    del arguments
    print(f"bilevel {version('bilevel')}")


def _info(arguments: argparse.Namespace) -> None:
    del arguments
    print(f"bilevel {version('bilevel')}, Python {platform.python_version()}, {platform.platform()}")
    print("\nbackends")
    for entry in sorted(entry_points(group="bilevel.backends"), key=lambda entry: entry.name):
        print(f"  {entry.name:<10}{_backend(entry.name)}")
    for kind in ("solvers", "preconditioners"):
        print(f"\n{kind}, with their options and defaults")
        for entry in sorted(entry_points(group=f"bilevel.{kind}"), key=lambda entry: entry.name):
            try:
                make = entry.load()
            except Exception as error:
                print(f"  {entry.name:<10}does not load: {error}")
                continue
            print(f"  {entry.name:<10}{(make.__doc__ or '').partition(chr(10))[0]}")
            print(f"  {'':<10}{', '.join(map(_assignment, *zip(*solver_options(make).items(), strict=True)))}")


def _backend(name: str) -> str:
    try:
        devices = ", ".join(get_backend(name).devices())
    except ImportError as error:
        return str(error)
    try:
        return f"{version(name)}, on {devices}"
    except PackageNotFoundError:
        return f"on {devices}"


def _assignment(option: str, default: Any) -> str:
    return f"{option} (required)" if default is dataclasses.MISSING else f"{option}={default!r}"

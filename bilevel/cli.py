"""The `bilevel` command: `bilevel info`, and `bilevel demo`, an example on real data."""

import argparse
import dataclasses
import platform
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from bilevel.config import get_backend, get_solver, solver_options
from bilevel.errors import SolverError
from bilevel.linear_solvers import CG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for invalid input, with one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, ImportError, OSError, SolverError) as error:
        print(f"bilevel: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bilevel", description="Hypergradients by implicit differentiation.")
    parser.add_argument("--version", action="version", version=f"bilevel {version('bilevel')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    info = commands.add_parser("info", help="show backends, devices, and solvers with their options")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="tune a penalty for every weight of a classifier of digits",
        description="Tune a penalty for every weight of a classifier of scikit-learn's digits, by implicit "
        "differentiation: softmax regression with the numpy backend, a small network with any other.",
    )
    demo.add_argument("--backend", default="numpy", help="numpy (the default), torch or jax")
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
    demo.add_argument("--seed", type=_seed, default=0, help="seed of the data split and the first weights (0)")
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
    from bilevel.demo import demo  # slow to import, and not needed for `bilevel info`

    solver = arguments.solver if arguments.config is None else Path(arguments.config)
    options = dict(arguments.options)
    try:
        get_solver(solver or CG(), **options)
    except TypeError as error:  # a wrong option; elsewhere, a TypeError is a bug
        hint = "" if solver else " This is the demo's default solver. Choose another one, such as --solver neumann."
        raise ValueError(f"{error}{hint}") from error
    demo(arguments.backend, solver, options, arguments.seed, arguments.out)


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

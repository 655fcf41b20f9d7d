"""Options, and histories that are stored once: what the systems of this folder share."""

import argparse
import json
import math
import os
from collections.abc import Callable
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def options(doc: str, argv: list[str] | None, seeds: int = 3) -> argparse.Namespace:
    """Parse the options that all systems take; with --fast there is one seed."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="where mnist/ and the like lie; without: stand-ins")
    parser.add_argument("--fast", action="store_true", help="a small version, on stand-ins for the data, in seconds")
    parser.add_argument("--config", metavar="FILE.toml", help="run its table [solver] too, as the variant 'config'")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many; {seeds} unless told")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these alone")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for histories; none is made twice")
    arguments = parser.parse_args(argv)
    if arguments.fast:
        arguments.data = None
        if arguments.out == RESULTS:
            parser.error("--fast needs --out DIR: the histories of the full runs stay as they are.")
    arguments.seeds = range(arguments.seeds or (1 if arguments.fast else seeds))
    return arguments


def variants(arguments: argparse.Namespace, solvers: dict[str, Any]) -> dict[str, Any]:
    """Return the variants to run, by name: those of a system, and that of --config."""
    if arguments.config:
        solvers = {**solvers, "config": arguments.config}
    unknown = set(arguments.only or ()) - set(solvers)
    if unknown:
        raise SystemExit(f"--only: no variant {', '.join(sorted(unknown))}; there are {', '.join(solvers)}.")
    return {name: solver for name, solver in solvers.items() if not arguments.only or name in arguments.only}


def stored(
    arguments: argparse.Namespace, system: str, variant: str, settings: dict[str, Any], run: Callable[[Path], dict]
) -> dict[str, Any]:
    """Return the history of a run: from its file, if it is there with these settings, else by running it.

    Args:
        arguments: of the command line.
        system: names the folder.
        variant: names the file, with its seed if it has one.
        settings: what the run depends on, for the file.
        run: is given a path for checkpoints, of these settings alone, and returns the history: ``rows``, ``result``,
            and what else there is to keep.

    Raises:
        FloatingPointError: if a number in the history is not finite.
    """
    path = arguments.out / system / f"{variant}.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        history = json.loads(path.read_text())
        if history["settings"] == settings:
            return history
    path.parent.mkdir(parents=True, exist_ok=True)
    history = {
        "settings": settings,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("bilevel", "numpy")},
        **run(path.with_suffix(f".{sha256(json.dumps(settings).encode()).hexdigest()[:8]}.checkpoint")),
    }
    for row in (*history.get("rows", ()), history["result"]):
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{system}, {variant}: {name} is {value}.")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(history, indent=1) + "\n")
    os.replace(partial, path)
    return history


def show(histories: dict[str, dict[str, Any]]) -> None:
    """Print the results, a line each."""
    for name, history in histories.items():
        numbers = "  ".join(f"{key} {_short(value)}" for key, value in history["result"].items())
        print(f"{name:<28}{numbers}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

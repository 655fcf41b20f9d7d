"""A solver with its preliminary work done."""

import dataclasses
from typing import Any


def prepared(solver: Any, options: dict[str, Any]) -> Any:
    """Return a solver with the options that its ``prepare`` has returned, nested as they are."""
    parts = {name: getattr(solver, name) for name in options}
    known = {k: prepared(parts[k], v) if hasattr(parts[k], "prepare") else v for k, v in options.items()}
    return dataclasses.replace(solver, **known)

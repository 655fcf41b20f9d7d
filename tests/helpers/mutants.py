"""A module with one line of its source changed: a planted fault, which a law must catch."""

import inspect
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """Return a copy of a module in which ``old``, which occurs once, is ``new``."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}: adapt the fault"
    copy = ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(compile(source.replace(old, new), f"{module.__name__} with {new!r}", "exec"), vars(copy))
    return copy

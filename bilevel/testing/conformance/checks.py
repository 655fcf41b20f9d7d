"""Conformance checks: laws with names, which can be excused."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any, NamedTuple
from unittest import SkipTest

from bilevel.backend import Backend
from bilevel.errors import DependenceWarning, InnerProblemWarning
from bilevel.messages import suggest

Law = Callable[[Any], None]
DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Check:
    """One law, ready to be called without arguments.

    Attributes:
        name: the name of the law with a backend and perhaps a dtype, as in ``"definite-torch-float32"``. ``str``
            returns it.
        law: the law as a sentence.
        run: the function that raises if the law is broken.
        excuse: the reason why the law may be broken; None: it may not.
    """

    name: str
    law: str
    run: Callable[[], None] = field(repr=False)
    excuse: str | None = None

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        """Check the law.

        Raises:
            AssertionError: if the law is broken, with the system, the expected and the actual result; or if the law is
                excused but holds.
            unittest.SkipTest: if the law is excused and broken. Pytest shows a skip with the reason.
        """
        __tracebackhide__ = True  # pytest shows the caller's line
        try:
            with warnings.catch_warnings():  # the laws need params that are no solution, and objectives without λ
                for category in (DependenceWarning, InnerProblemWarning):
                    warnings.simplefilter("ignore", category)
                self.run()
        except Exception as error:
            if self.excuse is not None:
                raise SkipTest(f"{self.name} is excused: {self.excuse}") from None
            if isinstance(error, AssertionError):
                raise AssertionError(f"{self.name}: {self.law}\n{error}") from None
            raise AssertionError(f"{self.name}: {self.law}\nRaised {type(error).__name__}: {error}") from error
        if self.excuse is not None:
            raise AssertionError(
                f"{self.name} is excused ({self.excuse}), but holds. Remove it from excused, or excuse only the checks "
                "that fail, by their full names."
            )


class Applied(NamedTuple):
    """A law and the subject to check."""

    law: Law
    subject: Any
    variant: tuple[str, ...]  # the backend, and the dtype if there are several

    @property
    def name(self) -> str:
        """Return the name of the check."""
        return "-".join((name_of(self.law), *self.variant))


def name_of(law: Law) -> str:
    """Return the name by which a law is excused."""
    return law.__name__.strip("_")


def collect(
    applied: Iterable[Applied], excused: Mapping[str, str] | None, laws: Iterable[Law], backends: Iterable[str]
) -> list[Check]:
    """Return the checks, with their excuses.

    Args:
        applied: laws with their subjects.
        excused: reasons, by the name of a law or of a single check.
        laws: all laws, also those that do not apply here, so that excuses are valid on all machines.
        backends: the names of all backends, installed or not.

    Raises:
        ValueError: if no check has an excused name, with the nearest name.
    """
    excused, names = dict(excused or {}), sorted(map(name_of, laws))
    on_backend = {f"{name}-{backend}" for name in names for backend in backends}
    known = {*names, *on_backend, *(f"{check}-{dtype}" for check in on_backend for dtype in DTYPES)}
    for name in excused:
        if name not in known:
            raise ValueError(f"excused: there is no check {name!r}." + suggest(name, names))
    return [
        Check(
            name=each.name,
            law=(each.law.__doc__ or "").partition("\n")[0],
            run=partial(each.law, each.subject),
            excuse=excused.get(each.name, excused.get(name_of(each.law))),
        )
        for each in applied
    ]


def require(holds: object, where: str, expected: str, got: object) -> None:
    """Raise an AssertionError with the place, the expected and the actual result, unless ``holds`` is true."""
    if not holds:
        raise AssertionError(f"On {where}:\n  expected {expected}\n  got      {got}")


def known_backends(found: Iterable[Backend]) -> set[str]:
    """Return the names of these backends and of all entry points, also without an installed framework."""
    return {backend.name for backend in found} | set(entry_points(group="bilevel.backends").names)

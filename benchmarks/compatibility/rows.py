"""The rows of the table: losses with parts of a package, and what is expected of their second derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

Loss = Callable[[dict[str, Any]], Any]
Made = tuple[Loss, dict[str, Any]]  # a loss, and the parameters at which it is checked


class Row(NamedTuple):
    """One check. ``expected`` is "right", "wrong", "nan", or "raises"."""

    package: str
    part: str
    expected: str
    advice: str
    make: Callable[[], Made]


class Rows(list[Row]):
    """A list of rows, with a decorator that adds one."""

    def add(self, package: str, part: str, expected: str, advice: str = "") -> Callable[[Callable[[], Made]], None]:
        """Add the loss that the decorated function makes. It imports the package."""

        def decorate(make: Callable[[], Made]) -> None:
            self.append(Row(package, part, expected, advice, make))

        return decorate

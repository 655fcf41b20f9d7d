"""Checks that two trees of arrays have the same structure, shapes and dtypes."""

from bilevel.spaces.array import V
from bilevel.spaces.space import Layout, Space


def check_layout(name: str, tree: object, other: str, space: Space[V]) -> None:
    """Raise a ValueError unless a tree has the layout of a space. The error names the first leaf that differs."""
    compare_layouts(name, space.layout(tree), other, space.layout(space.like))


def compare_layouts(name: str, found: Layout, other: str, expected: Layout) -> None:
    """Raise a ValueError unless two layouts are equal. The error names the first leaf that differs."""
    for path in [*expected, *found]:
        if found.get(path) != expected.get(path):
            raise ValueError(
                f"{name}{path}: expected the structure of {other}, where this leaf {_words(expected.get(path))}; "
                f"it {_words(found.get(path), 'is missing')}."
            )


def _words(leaf: tuple[tuple[int, ...], str] | None, absent: str = "does not exist") -> str:
    return absent if leaf is None else f"has shape {leaf[0]} and type {leaf[1]}"

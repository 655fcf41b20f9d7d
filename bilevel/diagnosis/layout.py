"""The text of a report."""

from collections.abc import Iterable, Sequence
from textwrap import fill

from bilevel.diagnosis.finding import Finding

WIDTH = 100
LABEL = 15  # width of the first column
Line = tuple[set[str], str, str]
"""The names of the findings that mark a line of the table, its label and its text."""


def written(name: str, found: Sequence[Finding], lines: Iterable[Line], further: Iterable[str] = ()) -> str:
    """Return the text of a report: a heading, a table with marks, the findings, and further paragraphs."""
    heading = f"{len(found)} finding{'s' * (len(found) > 1)}" if found else "no errors were found"
    marked = {f.name for f in found}
    table = [f"{'>' if marks & marked else ' '} {label:<{LABEL}}{text}" for marks, label, text in lines]
    texts = [f"{i}. {f.what} {f.way_out}".strip() for i, f in enumerate(found, 1)]
    return "\n\n".join([f"{name}: {heading}", "\n".join(table), *(fill(text, WIDTH) for text in [*texts, *further])])

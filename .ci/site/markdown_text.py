"""Changes of Markdown as GitHub reads it, and of docstrings, for Python-Markdown."""

import re
from collections.abc import Callable

ITEM = re.compile(r"(?:[-*]|\d+\.) ")
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)
FORMULA = re.compile(r"^```math\n(.*?)\n```$\n", re.MULTILINE | re.DOTALL)
COMPARISON = re.compile(r"^( +\w[\w, ]*: )>", re.MULTILINE)


def with_indented_items(markdown: str) -> str:
    """Indent what belongs to an item of a list by four spaces, as Python-Markdown expects. GitHub expects two or three.

    Python-Markdown also needs an empty line after an item of several paragraphs.
    """
    lines: list[str] = []
    fenced, paragraphs, more = False, False, 0
    for line in markdown.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        if not fenced and (item := ITEM.match(line)):
            if paragraphs and lines[-1]:
                lines.append("")
            paragraphs, more = False, max(0, 4 - len(item[0]))
        elif line and not line.startswith(" "):
            paragraphs, more = False, 0
        elif line and more:
            paragraphs = paragraphs or not lines[-1]
            line = " " * more + line
        lines.append(line)
    return "\n".join(lines)


def with_formulas(markdown: str, convert: Callable[[str], str]) -> str:
    """Replace the fences of LaTeX, which GitHub shows as formulas, by what ``convert`` makes of them."""
    return FORMULA.sub(lambda formula: f"<div>{convert(formula[1])}</div>\n", markdown)


def docstring_as_markdown(docstring: str) -> str:
    """Return a docstring with its doctests between fences, and with "steps: > 0" as text."""

    def fence(doctest: re.Match[str]) -> str:
        indent = doctest[1]
        return f"{indent}```pycon\n{doctest[0]}\n{indent}```"

    return COMPARISON.sub(r"\1\\>", DOCTEST.sub(fence, docstring))

"""Find wording that is hard to read: print file, line and phrase of each place, and exit with 1 if there is one.

In Markdown, it reads all text but code, and also checks the length of sentences. In notebooks, it reads the Markdown.
In Python, it reads docstrings, comments, and string constants with a space, which are usually messages. CONTRIBUTING.md
states the rules.
"""

import ast
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOTS = ["*.md", "docs/*.md", "docs/notebooks/*.ipynb", "examples/README.md", "bilevel", "backends"]  # patterns
LONGEST = 25  # words of a sentence in Markdown

PHRASES = [
    r"\b(that|those) of\b",
    r"\bof (its|one's) own\b",
    r", say[,)]",
    r"\b(anew|beside|likewise|as ever|astray)\b",
    r"(?:\A|[.!?:]\s+|\n\s*\n\s*)\b(What|Of)\b",  # opens a sentence
    r"\b(for|of|to|by) who\b",
    r"\b(solver|backend|framework|library|program|process|module|function|method|optimizer|loop|loss|space)s?,? who\b",
]
PHRASE = re.compile("|".join(PHRASES).replace(" ", r"\s+"))
CODE = re.compile(r"(`+).+?\1", re.DOTALL)
Passage = tuple[int, str]  # the number of its first line, and its text


def main() -> int:
    """Check the files and folders in the arguments. Without arguments, check the files that ROOTS matches."""
    top = Path(__file__).parents[1]
    paths = [path for root in ROOTS for path in sorted(top.glob(root))]
    found = [message for path in [top / name for name in sys.argv[1:]] or paths for message in check(path, top)]
    print(*found, sep="\n")
    return bool(found)


def check(path: Path, top: Path) -> Iterator[str]:
    """Yield what is wrong in a file or folder."""
    if path.is_dir():
        for inside in sorted(path.rglob("*.py")):
            yield from check(inside, top)
        return
    markdown = path.suffix != ".py"
    for start, text in (markdown_passages if markdown else python_passages)(path):
        text = CODE.sub(lambda code: "CODE" + "\n" * code[0].count("\n"), text)
        for place, message in [*phrases(text), *(long_sentences(text) if markdown else [])]:
            yield f"{path.relative_to(top)}:{start + text.count(chr(10), 0, place)}: {message}"


def phrases(text: str) -> Iterator[Passage]:
    """Yield where a phrase of the list stands, and the phrase."""
    for match in PHRASE.finditer(text):
        spoken = match[0].lstrip(" \n.!?:")
        yield match.end() - len(spoken), " ".join(spoken.split())


def long_sentences(text: str) -> Iterator[Passage]:
    """Yield where a sentence of too many words begins, and how it begins."""
    text = re.sub(r"\]\([^)]*\)", "]", text)  # links: their text alone
    start = 0
    for end in [*(m.end() for m in re.finditer(r"[.!?][\"')*]*\s+(?=[\"'(*\[]*[^\sa-z\"'(*\[])", text)), len(text)]:
        words = [word for word in text[start:end].split() if re.search(r"\w", word)]
        if len(words) > LONGEST:
            yield start, f"a sentence of {len(words)} words: {' '.join(words[:6])} ..."
        start = end


def markdown_passages(path: Path) -> Iterator[Passage]:
    """Yield paragraphs, headings, items of lists and cells of tables; no code and no comments.

    In a notebook, lines are counted from the first line of Markdown.
    """
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^```.*?^```$|<!--.*?-->", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        begins = not line.strip() or re.match(r"\s*([-*|#]|\d+\.)\s", line)
        if begins and lines:
            yield number - len(lines), "\n".join(lines)
            lines = []
        if line.startswith("|"):
            yield from ((number, cell.strip()) for cell in line.split("|"))
        elif line.strip() and not (line.startswith("    ") and not lines):
            lines.append(re.sub(r"^\s*([-*#]+|\d+\.)\s+", "", line))


def python_passages(path: Path) -> Iterator[Passage]:
    """Yield the strings that have a space in them, without doctests, and blocks of comments."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"^\s*(>>>|\.\.\.).*", "", node.value, flags=re.MULTILINE)
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if block and line != last + 1:
                yield last + 1 - len(block), "\n".join(block)
                block = []
            block.append(token.string.lstrip("#: "))
            last = line
    if block:
        yield last + 1 - len(block), "\n".join(block)


if __name__ == "__main__":
    sys.exit(main())

"""The check of wording finds what it should, at the right line, and leaves code alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "prose.py"


@pytest.fixture
def found(tmp_path):
    """Return a function: the lines and messages that the check has for a file of this name and text."""
    copy = tmp_path / ".ci" / "prose.py"
    copy.parent.mkdir()
    copy.write_text(SCRIPT.read_text("utf-8"), encoding="utf-8")

    def check(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        done = subprocess.run([sys.executable, copy, name], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        assert done.returncode == bool(done.stdout.strip())
        return [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line], [
            int(line.split(":")[1]) for line in done.stdout.splitlines() if line
        ]

    return check


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("The norm is that of b.", "that of"),
        ("The norms are those\nof b.", "those of"),
        ("It has a space of its own.", "of its own"),
        ("Write a solver of one's own.", "of one's own"),
        ("Take, say, ten steps.", ", say,"),
        ("It starts anew.", "anew"),
        ("The file is beside it.", "beside"),
        ("Others do likewise.", "likewise"),
        ("It runs as ever.", "as ever"),
        ("CG goes astray.", "astray"),
        ("What it returns is v.", "What"),
        ("It stops. Of a root it returns v.", "Of"),
        ("A solver, who stops early, warns.", "solver, who"),
    ],
)
def test_each_phrase_is_found_in_every_kind_of_text(found, text, phrase):
    comment = "".join(f"# {line}\n" for line in text.splitlines())
    assert found("page.md", f"# Title\n\n{text}\n")[0] == [phrase]
    assert found("docstring.py", f'"""{text}"""\n')[0] == [phrase]
    assert found("comment.py", comment)[0] == [phrase]
    assert found("message.py", f"raise ValueError({text!r})\n")[0] == [phrase]


def test_the_line_is_that_where_the_phrase_stands(found):
    assert found("page.md", "```python\nx = 1\n```\n\nOne line,\nand anew.\n")[1] == [6]
    assert found("code.py", 'x = 1\n"""One line.\n\nIt starts anew.\n"""\n# one\n# anew\n')[1] == [4, 7]


def test_code_and_comments_of_a_page_are_not_text(found):
    page = "A `beside` b.\n\n    beside = 1\n\n```python\nanew = beside\n```\n\n<!-- anew -->\n"
    assert found("page.md", page) == ([], [])
    assert found("code.py", 'beside = "anew"\ndef f():\n    """Return 1.\n\n    >>> anew = 1\n    """\n') == ([], [])


def test_the_markdown_of_a_notebook_is_read(found):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Good."]},
        {"cell_type": "code", "source": ["anew = 1"], "outputs": [{"text": ["anew\n"]}]},
        {"cell_type": "markdown", "source": "It starts anew."},
    ]
    assert found("page.ipynb", json.dumps({"cells": cells})) == (["anew"], [5])


def test_long_sentences_of_a_page_are_found(found):
    words = "word " * 24
    assert found("page.md", f"# A\n\nA {words}end.\n")[1] == [3]
    assert found("page.md", f"# A\n\nShort.\nA {words}\n") == ([], [])
    assert found("code.py", f"# {words}{words}\n") == ([], [])

"""Docstrings as Markdown: an extension of griffe, which reads them for mkdocstrings."""

from typing import Any

import griffe
from markdown_text import docstring_as_markdown


class Docstrings(griffe.Extension):
    """Change doctests and options such as `steps: > 0`, which Markdown would read as quotations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = docstring_as_markdown(obj.docstring.value)

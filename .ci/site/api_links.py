"""The API reference: entries by public names, and links to them from code in the text. These are hooks of MkDocs."""

import logging
import re
from typing import TYPE_CHECKING

from public_names import ENTRY, entries, public_names

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PLACES = public_names()
LISTED = {PLACES.get(name) for _, name in entries()}
ANCHORS = {  # an object with several public names has one entry
    name: place for name, place in PLACES.items() if place in LISTED
}
PREFIXES = {"api/torch.md": "bilevel_torch.", "api/jax.md": "bilevel_jax.", "api/testing.md": "bilevel.testing."}
NOT_TEXT = r"<pre.*?</pre>|<a\b.*?</a>|<h[1-6]\b.*?</h[1-6]>"
CODE = re.compile(rf"{NOT_TEXT}|<code>@?([\w.]+)(\([^<]*\))?</code>", re.DOTALL)
NOT_LISTED = [
    *("bl.problems", "bl.prox", "bl.projections", "bilevel_torch.data"),  # packages
    *("bl.__version__", "bilevel_torch.backend", "bilevel_jax.backend"),
]
OLD = ["changelog.md"]  # pages that name what no longer exists
log = logging.getLogger("mkdocs.hooks")  # `strict` makes errors of its warnings


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Turn the public names of entries into the places of their definitions, where mkdocstrings finds them.

    `bilevel.hypergradient` is a function and a module. mkdocstrings would find the module.
    """
    level = 3 if "\n## " in markdown else 2  # below the headings of the page
    if page.file.src_uri.startswith("api/"):
        return ENTRY.sub(lambda entry: with_heading(entry[1], level), markdown)
    return markdown


def on_page_content(html: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Link public names in code to their entries."""
    return with_references(html, page.file.src_uri)


def with_heading(name: str, level: int) -> str:
    """Return an entry of mkdocstrings whose heading is a public name. More options may follow it."""
    if name not in PLACES:
        log.warning(f"`::: {name}` in docs/api is no public name.")
        return ""
    options = {"heading": name, "heading_level": level, "toc_label": name.rpartition(".")[2]}
    return "\n      ".join(
        [f"::: {PLACES[name]}\n    options:", *(f"{key}: {value}" for key, value in options.items())]
    )


def with_references(html: str, page: str) -> str:
    """Make links of public names such as `bl.minimize`, and in docs/api also of `minimize`."""

    def refer(code: re.Match[str]) -> str:
        if not code[1]:
            return code[0]
        name, members = split(full_name(code[1], page))
        if name in ANCHORS:
            optional = " optional" if members else ""  # an entry may leave out members
            return f'<autoref identifier="{ANCHORS[name]}{members}"{optional}>{code[0]}</autoref>'
        if re.match(r"(bl|bilevel_torch|bilevel_jax)\.", code[1]) and code[1] not in NOT_LISTED and page not in OLD:
            log.warning(f"{page}: `{code[1]}` is no public name with an entry in docs/api.")
        return code[0]

    return CODE.sub(refer, html)


def full_name(name: str, page: str) -> str:
    """Return the public name that a name in the text stands for, if there is one. It may be followed by members."""
    if name.startswith("bl."):
        return "bilevel." + name.removeprefix("bl.")
    if "." in name or not page.startswith("api/") or (name.islower() and "gradient" not in name):
        return name
    found = [full for full in ANCHORS if full.endswith(f".{name}")]
    here = PREFIXES.get(page, "bilevel.") + name
    return here if here in found else next(iter(found), name)


def split(name: str) -> tuple[str, str]:
    """Return the part of a name that has an entry, and the rest. Without an entry, return the name."""
    parts = name.split(".")
    starts = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    start = next((start for start in starts if start in ANCHORS), name)
    return start, name.removeprefix(start)

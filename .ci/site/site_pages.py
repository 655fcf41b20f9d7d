"""Pages of the site from files outside of docs/, and links to such files. These are hooks of MkDocs."""

import json
import posixpath
import re
from functools import cache
from typing import TYPE_CHECKING

import notebooks
from markdown_text import with_formulas, with_indented_items
from public_names import ROOT

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PAGES = {  # of the repository: of the site
    "benchmarks/RESULTS.md": "results.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages."""
    from mkdocs.structure.files import File

    for source, page in pages().items():
        text = (ROOT / source).read_text("utf-8")
        if source.endswith(".ipynb"):
            folder, name = posixpath.split(page.removesuffix(".md"))
            text, pictures = notebooks.as_page(json.loads(text), name)
            for picture, content in pictures.items():
                files.append(File.generated(config, f"{folder}/{picture}", content=content))
        elif not source.endswith(".md"):
            language = source.rpartition(".")[2]
            text = f"---\nsearch: {{ exclude: true }}\n---\n# {source}\n\n```{language}\n{text.rstrip()}\n```\n"
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Make the links of a page lead to pages of the site. The first page has no other pages in its section."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return with_site_links(with_indented_items(with_formulas(markdown, as_mathml)), page.file.src_uri)


def as_mathml(latex: str) -> str:
    """Return a formula as MathML, which browsers show without a script. Raise a ValueError for an unknown command."""
    from latex2mathml.converter import convert

    if "\\" in (made := convert(latex, display="block")):
        raise ValueError(f"LaTeX that cannot be shown: {latex}")
    return made


@cache
def pages() -> dict[str, str]:
    """Return the files of the repository that become pages of the site, and the names of these pages."""
    patterns = ("examples/*.toml", "examples/*/*.py", "docs/notebooks/*.ipynb")
    names = [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return PAGES | {name: name.removeprefix("docs/").rpartition(".")[0] + ".md" for name in names}


def with_site_links(markdown: str, page: str) -> str:
    """Rewrite the links between docs/ and the rest of the repository, in a page of the site.

    A link to a file that is no page loses its target: only its text remains. Links to files that do not exist stay,
    and the strict build fails for them.
    """
    source = next((name for name, made in pages().items() if made == page), f"docs/{page}")

    def rewrite(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / target).exists():
            return link[0]
        made = pages().get(target)
        if not made and target.startswith("docs/"):
            made = target.removeprefix("docs/")
        made = made or pages().get(f"{posixpath.dirname(target)}/README.md")
        return f"[{text}]({posixpath.relpath(made, posixpath.dirname(page) or '.')}{anchor})" if made else text

    return LINK.sub(rewrite, markdown)

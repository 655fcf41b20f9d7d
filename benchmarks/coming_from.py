"""Run all snippets of docs/coming-from.md, docs/from-jaxopt.md and docs/from-search.md.

The test suite leaves out the snippets of the other libraries.

Run it in .venv-peers, which `make bench` makes: .venv-peers/bin/python -m benchmarks.coming_from
It stops with an error if one of our snippets gives another number than the page. Compare what the others print.
"""

import re
import sys
import warnings
from pathlib import Path

PAGES = ("coming-from.md", "from-jaxopt.md", "from-search.md")


def main() -> None:
    """Run the blocks of each page in their order, in one namespace. Arguments are the names of pages."""
    for page in sys.argv[1:] or PAGES:
        text = (Path(__file__).parents[1] / "docs" / page).read_text("utf-8")
        names: dict[str, object] = {"__name__": "page"}
        for language, block in re.findall(r"^```(python|py)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            print("bilevel" if language == "python" else re.findall(r"(?:import|from) (\w+)", block)[-1])
            exec(block, names)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the other libraries are older than this torch and JAX
    main()

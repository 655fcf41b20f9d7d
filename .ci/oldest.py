"""Print the lowest versions that pyproject.toml allows, one constraint for pip a line."""

import re
import tomllib
from itertools import chain
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]

for requirement in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
    if bound := re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement):
        print("==".join(bound.groups()))
print("pyparsing<3.3")  # matplotlib 3.9 calls functions that 3.3 deprecates, and warnings are errors in tests

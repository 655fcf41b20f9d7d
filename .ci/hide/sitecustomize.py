"""Make the modules named in BILEVEL_HIDE look not installed, in this process and in every child of it.

Python imports this file at start-up when its folder is on PYTHONPATH (`make test HIDE=torch` puts it there).
The names are separated by commas. Importing a hidden module, `find_spec` and `importlib.metadata` all answer
as if it had never been installed.
"""

import os
import sys
from importlib.machinery import PathFinder

hidden = frozenset(os.environ.get("BILEVEL_HIDE", "").split(","))


class HidingPathFinder(PathFinder):
    """The standard finder, less the hidden modules and their distributions."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in hidden else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (found for found in super().find_distributions(*args, **kwargs) if found.name not in hidden)


sys.meta_path[sys.meta_path.index(PathFinder)] = HidingPathFinder

"""The public names of the packages, and their entries in docs/api. It reads files only: no package is imported."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = [  # in order: an object of several packages has one entry, under its name in the first of them
    "bilevel",
    "bilevel.problems",
    "bilevel.prox",
    "bilevel.projections",
    "bilevel.linear_solvers",
    "bilevel.preconditioners",
    "bilevel.methods",
    "bilevel.metagradients",
    "bilevel.diagnosis",
    "bilevel.plot",
    "bilevel.sklearn",
    "bilevel.testing",
    "bilevel_numpy",
    "bilevel_torch",
    "bilevel_torch.data",
    "bilevel_torch.trainers.huggingface",
    "bilevel_torch.trainers.lightning",
    "bilevel_jax",
]
FURTHER = [  # in no `__all__`: for authors of problems, solvers and backends, for tests, and parts of results
    "bilevel.backend.Backend",
    "bilevel.diagnosis.measurements.Measured",
    "bilevel.linearization.Dependence",
    "bilevel.linearization.LinearizedMap",
    "bilevel.linearization.Reduction",
    "bilevel.linearization.OuterDerivatives",
    "bilevel.operators.linear_operator.LinearOperator",
    "bilevel.operators.scaling.scale_free",
    "bilevel.problems.central_differences.finite_differences",
    "bilevel.problems.k_fold.KFoldProblem",
    "bilevel.problems.protocols.BilevelProblem",
    "bilevel.problems.protocols.InnerProblem",
    "bilevel.problems.protocols.Constraint",
    "bilevel.problems.protocols.OuterObjective",
    "bilevel.search.evaluations.Evaluation",
    "bilevel.search.newton_fit.Fit",
    "bilevel.spaces.space.Space",
    "bilevel.steps.Steps",
    "bilevel.testing.strategies",
]
ENTRY = re.compile(r"^::: ([\w.]+)(\n    options:)?$", re.MULTILINE)


def public_names() -> dict[str, str]:
    """Return the public names, and where each object is defined: bilevel.linear_solvers.cg.CG.

    Names of packages are left out, and `backend`, the instance in each backend's package. mkdocstrings would take it
    for the module of this name, so the text of docs/api describes it.
    """
    names = {f"{package}.{name}": definition(package, name) for package in PACKAGES for name in exported(package)}
    names |= {name: name for name in FURTHER}
    return {name: place for name, place in names.items() if name not in PACKAGES and not name.endswith(".backend")}


def entries() -> Iterator[tuple[str, str]]:
    """Yield the page and the name of each entry in docs/api."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for entry in ENTRY.finditer(page.read_text("utf-8")):
            yield f"api/{page.name}", entry[1]


def exported(package: str) -> list[str]:
    """Return `__all__` of a package."""
    for node in syntax(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}: no __all__")


def definition(module: str, name: str) -> str:
    """Return the module that defines a name, followed by the name."""
    body = syntax(module).body
    defined = any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name for node in body)
    for node in [] if defined else body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return definition(node.module, name) if node.module != module else f"{module}.{name}"
    return f"{module}.{name}"


@cache
def syntax(module: str) -> ast.Module:
    """Return the parsed source of a module or package."""
    folder = ROOT if module.split(".")[0] == "bilevel" else ROOT / "backends"
    path = folder.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))

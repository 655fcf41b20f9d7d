"""Compare Hessian-vector products of losses with differences of their gradients, and print a table.

    make compatibility
    python -m benchmarks.compatibility [--only transformers]

The losses contain parts of other packages. The exit code is 1 if a row is not as expected. Everything is in float64.
The error is relative, along one random direction. "right" means at most 1 %. Parts that compute in float32 have errors
of 1e-4 and more. If a product is wrong, `bl.diagnose` also runs, and the table says whether it finds the reason.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.flatten_util import ravel_pytree

import bilevel as bl
from benchmarks.compatibility import jax_rows, torch_rows
from benchmarks.compatibility.rows import Loss, Row

STEP, RIDGE, RIGHT = 1e-4, 0.05, 1e-2
Tree = Any


def main() -> int:
    """Check the rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="only packages whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    rows = [row for row in [*torch_rows.ROWS, *jax_rows.ROWS] if arguments.only in row.package]
    print("| package | part | second derivatives | use | error | `bl.diagnose` |\n|" + "---|" * 6)
    unexpected = [row for row in rows if not check(row)]
    for row in unexpected:
        print(f"not as expected: {row.package}, {row.part}: {row.expected}", file=sys.stderr)
    return bool(unexpected)


def check(row: Row) -> bool:
    """Print one row of the table. Return whether it is as expected. Raise the error of a loss without a gradient."""
    torch.manual_seed(0)
    plain, params = row.make()
    product, difference = (torch_products if of_torch(params) else jax_products)(with_ridge(plain), params)
    try:
        off = math.dist(product(), difference) / math.hypot(*difference)
    except Exception as error:
        kind, shown = "raises", f"`{type(error).__name__}`"
    else:
        kind = "nan" if math.isnan(off) else "right" if off <= RIGHT else "wrong"
        shown = f"{off:.0e}"
    found = diagnosis(plain, params) if kind in ("wrong", "nan") else ""
    cells = f"{row.package} {installed(row.package)}", row.part, kind, row.advice, shown, found
    print(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|", flush=True)
    return kind == row.expected


def with_ridge(loss: Loss, factor: Any = RIDGE) -> Loss:
    """Return a loss with a penalty, so that a part without any second derivative does not pass for an error."""

    def penalized(params: dict[str, Any], hparams: Any = factor) -> Any:
        leaves = params.values() if of_torch(params) else jax.tree.leaves(params)
        return loss(params) + hparams * sum((leaf**2).sum() for leaf in leaves) / 2

    return penalized


def of_torch(params: dict[str, Any]) -> bool:
    """Tell whether the parameters are tensors of torch."""
    return isinstance(next(iter(params.values())), torch.Tensor)


def torch_products(loss: Loss, params: Tree) -> tuple[Callable[[], list[float]], list[float]]:
    """Return a function for a product of the Hessian by two backward passes, and the product by differences."""
    generator = torch.Generator().manual_seed(1)
    v = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}

    def gradient(shift: float, graph: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = {k: (p + shift * v[k]).requires_grad_() for k, p in params.items()}
        return list(torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=graph)), list(leaves.values())

    def numbers(tensors: Iterable[torch.Tensor]) -> list[float]:
        return torch.cat([a.flatten() for a in tensors]).tolist()

    def product() -> list[float]:
        grads, leaves = gradient(0.0, graph=True)
        return numbers(torch.autograd.grad(grads, leaves, list(v.values())))

    ahead, behind = gradient(STEP)[0], gradient(-STEP)[0]
    return product, numbers((a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True))


def jax_products(loss: Loss, params: Tree) -> tuple[Callable[[], list[float]], list[float]]:
    """Return a function for a product of the Hessian by forward over reverse, and the product by differences."""
    flat, unflatten = ravel_pytree(params)
    v = jax.random.normal(jax.random.key(1), flat.shape, flat.dtype)
    gradient = jax.grad(lambda flat: loss(unflatten(flat)))
    difference = (gradient(flat + STEP * v) - gradient(flat - STEP * v)) / (2 * STEP)
    return lambda: jax.jvp(gradient, (flat,), (v,))[1].tolist(), difference.tolist()


def diagnosis(loss: Loss, params: Tree) -> str:
    """Return "finds it" if `bl.diagnose` finds a wrong derivative or a value that is not finite, else its findings."""
    xp = torch if of_torch(params) else jnp
    outer = with_ridge(lambda params: 0.0, 1.0)
    problem = bl.Problem(with_ridge(loss), lambda params, hparams: outer(params))
    report = bl.diagnose(problem, params, xp.asarray(RIDGE, dtype=xp.float64))
    names = {finding.name for finding in report.findings}
    if names & {"wrong derivative", "not finite"}:
        return "finds it"
    return ", ".join(sorted(names)) or "no finding"


def installed(package: str) -> str:
    """Return the version of a package."""
    return version(package.replace("_", "-")).partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())

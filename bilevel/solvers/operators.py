"""Combinators on linear operators, so that solvers do not each know what they do."""

from typing import Any

from bilevel.protocols import Operator, Tree, VectorSpace
from bilevel.solvers.options import is_python_number


def damped(operator: Operator, damping: Any, space: VectorSpace) -> Operator:
    """Return v -> (A + damping I) v."""
    if is_python_number(damping) and damping == 0:
        return operator
    return lambda v: space.axpy(damping, v, operator(v))


def residual(operator: Operator, rhs: Tree, x: Tree, space: VectorSpace) -> Tree:
    """Return b - A x, by one product."""
    return space.axpy(-1.0, operator(x), rhs)


def norm(x: Tree, space: VectorSpace) -> Any:
    """Return the Euclidean norm."""
    return space.xp.sqrt(space.dot(x, x))

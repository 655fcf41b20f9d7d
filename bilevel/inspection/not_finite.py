"""Locate a nan or an infinity, and its likely causes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.inspection.derivatives import Derivatives, linearized
from bilevel.inspection.entries import Arrays, Entries, Share, copied, entries, listed, shares
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Array, H, P

DATA = "Clean the data: drop or impute these entries, or mask them before a computation, not after it."
PARAMS = "The inner training diverged. Train again with a smaller learning rate."
HPARAMS = "An outer step diverged, or its hypergradient was not finite. Start again with a smaller outer step."
START = "Leave adjoint0 out, or pass the adjoint of a solve that did not fail."
VALUE = (
    "Check for overflow (a training that diverged, a penalty exp(λ) with a large λ), a logarithm or a division of "
    "zero, and nan in arrays that the loss closes over."
)
SINGULAR = (
    "An operation has no {derivative} at this point: a root, a norm or a power like |x|**1.5 of zero, the cosine "
    "similarity of a zero vector, equal singular values or eigenvalues, or where() with an invalid branch that is not "
    "chosen. Use sqrt(x + 1e-12), (x**2).sum() for a squared norm, and where(c, sqrt(where(c, x, 1)), 0). For a "
    'penalty with a kink, such as a norm, use bl.FixedPoint of its proximal step: "Kinks, bounds and constraints" in '
    "docs/problems.md."
)
FIRST, SECOND = SINGULAR.format(derivative="derivative"), SINGULAR.format(derivative="second derivative")


class NotFinite(NamedTuple):
    """The first quantity that is nan or infinite, in the order of their computation.

    Attributes:
        quantity: a description of a loss, a derivative or a product; "" for an argument.
        shares: the entries, leaf by leaf; empty for a number.
        way_out: what to check.
    """

    quantity: str
    shares: tuple[Share, ...]
    way_out: str

    def __str__(self) -> str:
        where = f" in {listed(self.shares)}" if self.shares else ""
        return f"{self.quantity} nan or infinite{where}." if self.quantity else f"There is nan or infinity{where}."


def locate(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> str:
    """Return the first quantity of a problem that is not finite, and its likely causes; "" if all are finite."""
    value, found = backend.run(_derived, problem, inputs)
    return described(not_finite(backend, problem, inputs, float(backend.to_host(value)), entries(backend, found)))


def in_start(backend: Backend, adjoint0: object) -> str:
    """Return the entries of a warm start that are not finite, and the way out; "" if all are finite."""
    return described(next(_in("", _floating(backend, adjoint0, "adjoint0"), START), None))


def described(first: NotFinite | None) -> str:
    """Return a quantity and its likely causes; "" for None."""
    return "" if first is None else f"{first} {first.way_out}"


def not_finite(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], value: float, found: Entries
) -> NotFinite | None:
    """Return the first quantity of a problem at a point that is not finite. It is the cause of the others."""
    trees = (found.grad, found.product, found.cross, found.outer_params, found.outer_hparams)
    if np.isfinite(value) and all(np.isfinite(x).all() for tree in trees for x in tree.values()):
        return None
    inner = backend.run(_inner, problem, inputs)
    of_inner = 0.0 if inner is None else float(backend.to_host(inner))
    return first_not_finite(backend, inputs._asdict(), of_inner, value, found, problem.kind == "equation")


def first_not_finite(
    backend: Backend, arguments: dict[str, object], inner: float, value: float, found: Entries, equation: bool = False
) -> NotFinite | None:
    """Return the first of some quantities that is not finite, in the order of their computation.

    Args:
        arguments: trees of any values, by their names in messages.
        inner: the inner objective; 0 for an equation.
        value: the outer objective.
        found: the derivatives. A part may be empty.
        equation: whether the inner problem is an equation.
    """
    return next(_quantities(backend, arguments, inner, value, found, equation), None)


def _quantities(
    backend: Backend, arguments: dict[str, object], inner: float, value: float, found: Entries, equation: bool
) -> Iterator[NotFinite]:
    for name, tree in arguments.items():
        arrays, way_out = _floating(backend, tree, name), {"params": PARAMS, "hparams": HPARAMS}.get(name, DATA)
        if not name.endswith("args") or not np.isfinite([inner, value]).all():
            yield from _in("", arrays, way_out)
        elif where := shares(np.isnan, arrays):  # an infinity in data may be intended, as in a mask of attention
            yield NotFinite("", where, way_out)
    if not np.isfinite(inner):
        yield NotFinite("The inner loss is", (), VALUE)
    if equation:
        yield from _in("The residual is", found.grad, VALUE)
        about, missing = "The residual is finite, but products with its derivative by", FIRST
    else:
        yield from _in("The inner loss is finite, but its gradient ∂L/∂w is", found.grad, FIRST)
        about = "The inner loss and its gradient are finite, but products with the derivative of ∂L/∂w by"
        missing = SECOND
    if not np.isfinite(value):
        yield NotFinite("The outer loss is", (), VALUE)
    yield from _in("The outer loss is finite, but its gradient ∂F/∂w is", found.outer_params, FIRST)
    yield from _in("The outer loss is finite, but its gradient ∂F/∂λ is", found.outer_hparams, FIRST)
    yield from _in(f"{about} params are", found.product, missing)
    yield from _in(f"{about} hparams are", found.cross, missing)


def _in(quantity: str, tree: Arrays, way_out: str) -> Iterator[NotFinite]:
    if where := shares(lambda x: ~np.isfinite(x), tree):
        yield NotFinite(quantity, where, way_out)


def _floating(backend: Backend, tree: object, name: str) -> Arrays:
    """Return the floating-point arrays in a tree of any values."""
    found = {name + path: leaf for path, leaf in backend.leaves(tree)}
    own = {path: leaf for path, leaf in found.items() if backend.owns(leaf) and backend.is_floating(leaf)}
    return {path: array for path, leaf in own.items() for array in copied(backend, leaf, path).values()}


def _inner(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> Array | None:
    return problem.value_and_residual(backend, inputs.params, inputs.hparams, inputs.inner_args)[0]


def _derived(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array, Derivatives[P, H]]:
    _, value, found = linearized(backend, problem, inputs, backend.space(inputs.params).normal(1))
    return value, found

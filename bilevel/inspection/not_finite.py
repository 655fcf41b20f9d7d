"""Find the first quantity that is nan or infinite, and its likely causes.

Quantities are in the order of their computation, so the first one is the cause of the others.
"""

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.inspection.derivatives import Derivatives, inner_value, linearized
from bilevel.inspection.entries import Arrays, Entries, Share, copied, entries, shares
from bilevel.linearization import Inputs
from bilevel.messages import listed
from bilevel.problems.protocols import BilevelProblem, is_equation
from bilevel.spaces.array import Array, H, P

DATA = "Clean the data: drop or impute these entries, or mask them before a computation, not after it."
PARAMS = "The inner training diverged. Train again with a smaller learning rate."
HPARAMS = "An outer step diverged, or its hypergradient was not finite. Start again with a smaller outer step."
START = "Leave adjoint0 out, or pass the adjoint of a solve that did not fail."
VALUE = (
    "Check for overflow (a training that diverged, a penalty exp(λ) with a large λ), a logarithm or a division of "
    "zero, a mean over no examples, and nan in arrays that the loss closes over."
)
SINGULAR = (
    "An operation has no {derivative} at this point: a root, a norm or a power like |x|**1.5 of zero, the cosine "
    "similarity of a zero vector, equal singular values or eigenvalues, or where() with an invalid branch that is not "
    "chosen. Use sqrt(x + 1e-12), (x**2).sum() for a squared norm, and where(c, sqrt(where(c, x, 1)), 0). For a "
    'penalty with a kink, such as a norm, use bl.Proximal: "Kinks, bounds and constraints" in '
    "docs/problems.md."
)
FIRST, SECOND = SINGULAR.format(derivative="derivative"), SINGULAR.format(derivative="second derivative")


class NotFinite(NamedTuple):
    """A quantity that is nan or infinite.

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
    inner, outer, found = backend.run(_values_and_derivatives, problem, inputs)
    losses = float(backend.to_host(inner)), float(backend.to_host(outer))
    return described(find_in_problem(backend, problem, inputs, *losses, entries(backend, found)))


def in_start(backend: Backend, adjoint0: object) -> str:
    """Return the entries of a warm start that are not finite, and the way out; "" if all are finite."""
    return described(next(_not_finite_in("", _floating(backend, adjoint0, "adjoint0"), START), None))


def described(first: NotFinite | None) -> str:
    """Return a quantity and its likely causes; "" for None."""
    return "" if first is None else f"{first} {first.way_out}"


def find_in_problem(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], inner: float, outer: float, found: Entries
) -> NotFinite | None:
    """Return the first quantity of a problem that is not finite. The losses and ``found`` are computed at the inputs.

    The inner loss can be the only one: in PyTorch, a mean of cross-entropies over no examples is nan, with a gradient
    of zero.
    """
    trees = (found.grad, found.product, found.cross, found.outer_params, found.outer_hparams)
    if np.isfinite([inner, outer]).all() and all(np.isfinite(x).all() for tree in trees for x in tree.values()):
        return None
    return find_not_finite(backend, inputs._asdict(), inner, outer, found, is_equation(problem))


def find_not_finite(
    backend: Backend,
    arguments: dict[str, object],
    inner: float | None,
    outer: float,
    found: Entries,
    equation: bool = False,
) -> NotFinite | None:
    """Return the first of some quantities that is not finite.

    Args:
        arguments: trees of any values, by their names in messages.
        inner: the value of the inner objective. None: unknown, or the inner problem is an equation.
        outer: the value of the outer objective.
        found: the derivatives. A part may be empty.
        equation: whether the inner problem is an equation.
    """
    return next(_all_not_finite(backend, arguments, inner, outer, found, equation), None)


def _all_not_finite(
    backend: Backend, arguments: dict[str, object], inner: float | None, outer: float, found: Entries, equation: bool
) -> Iterator[NotFinite]:
    inner_finite, outer_finite = inner is None or isfinite(inner), isfinite(outer)
    for name, tree in arguments.items():
        arrays, way_out = _floating(backend, tree, name), {"params": PARAMS, "hparams": HPARAMS}.get(name, DATA)
        if not (name.endswith("args") and inner_finite and outer_finite):
            yield from _not_finite_in("", arrays, way_out)
        elif where := shares(np.isnan, arrays):  # an infinity in data may be intended, as in a mask of attention
            yield NotFinite("", where, way_out)
    if not inner_finite:
        yield NotFinite("The inner loss is", (), VALUE)
    if equation:
        yield from _not_finite_in("The residual is", found.grad, VALUE)
        products, way_out = "The residual is finite, but products with its derivative by", FIRST
    else:
        yield from _not_finite_in("The inner loss is finite, but its gradient ∂L/∂w is", found.grad, FIRST)
        products = "The inner loss and its gradient are finite, but products with the derivative of ∂L/∂w by"
        way_out = SECOND
    if not outer_finite:
        yield NotFinite("The outer loss is", (), VALUE)
    yield from _not_finite_in("The outer loss is finite, but its gradient ∂F/∂w is", found.outer_params, FIRST)
    yield from _not_finite_in("The outer loss is finite, but its gradient ∂F/∂λ is", found.outer_hparams, FIRST)
    yield from _not_finite_in(f"{products} params are", found.product, way_out)
    yield from _not_finite_in(f"{products} hparams are", found.cross, way_out)


def _not_finite_in(quantity: str, tree: Arrays, way_out: str) -> Iterator[NotFinite]:
    if where := shares(lambda x: ~np.isfinite(x), tree):
        yield NotFinite(quantity, where, way_out)


def _floating(backend: Backend, tree: object, name: str) -> Arrays:
    """Return the floating-point arrays in a tree of any values."""
    found = {name + path: leaf for path, leaf in backend.leaves(tree)}
    own = {path: leaf for path, leaf in found.items() if backend.owns(leaf) and backend.is_floating(leaf)}
    return {path: array for path, leaf in own.items() for array in copied(backend, leaf, path).values()}


def _values_and_derivatives(
    backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]
) -> tuple[Array, Array, Derivatives[P, H]]:
    _, outer, found = linearized(backend, problem, inputs, backend.space(inputs.params).normal(1))
    return inner_value(backend, problem, inputs), outer, found

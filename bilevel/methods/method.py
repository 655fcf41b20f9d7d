"""The base class of methods, and the inner level that a method differentiates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, NamedTuple

from bilevel.backend import Backend
from bilevel.linear_solvers.solver import Solver
from bilevel.linearization import Dependence, LinearizedMap
from bilevel.operators.linear_operator import LinearOperator
from bilevel.problems.protocols import BilevelProblem, has_symmetric_system, is_indefinite
from bilevel.results import SolverInfo
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.space import Layout, Space


@dataclass(frozen=True)
class Level(Generic[P, H]):
    """The inner level of a problem at a point: the map r( · , λ, data) that defines w*.

    Attributes:
        backend: the framework.
        problem: the problem.
        params: w.
        hparams: λ.
        batches: the further arguments of the inner objective. With several, each product or step takes the next.
    """

    backend: Backend
    problem: BilevelProblem
    params: P
    hparams: H
    batches: list[Args]

    @property
    def space(self) -> Space[P]:
        """The space of vectors like params."""
        return self.backend.space(self.params)

    def linearize(self, args: Args | None = None, params: P | None = None) -> LinearizedMap[P, H]:
        """Linearize the map, by default on the first batch and at the params of the level."""
        params = self.params if params is None else params
        return self.problem.linearize(self.backend, params, self.hparams, self.batches[0] if args is None else args)

    def operator(self, at: LinearizedMap[P, H]) -> LinearOperator[P]:
        """Return the operator of the linear system: v -> (∂r/∂w)ᵀ v, or its reduction.

        Raise a TypeError if a problem with kinks or inequalities has several batches.
        """
        symmetric = has_symmetric_system(self.problem)
        transpose = None if symmetric else at.jvp_params
        A = LinearOperator(
            self.space, at.product, symmetric, transpose=transpose, indefinite=is_indefinite(self.problem)
        )
        if len(self.batches) == 1:
            return A
        if at.reduction is not None:
            raise TypeError(
                "inner_args is a list, one batch per product, but a problem with kinks or constraints needs all of "
                "the data: pass one tuple or, for kinks, bl.MicroBatches(batches)."
            )
        args = self.space.sequence(self.batches)
        return replace(A, sample=lambda i: self.linearize(args(i + 1)).vjp_params)


class Pullback(NamedTuple, Generic[P, H]):
    """A cotangent of w*, pulled back to λ.

    Attributes:
        hparams: (dw*/dλ)ᵀ times the cotangent; None if w* does not depend on λ.
        adjoint: v, or the solution of the reduced system of a proximal problem.
        info: information about the solve for v.
        dependence: see `LinearizedMap`. None if it is unknown.
    """

    hparams: H | None
    adjoint: P
    info: SolverInfo
    dependence: Dependence | None = None


class Solution(NamedTuple, Generic[P, H]):
    """w*, or an approximation of it, with its derivative.

    Attributes:
        params: w*, where the outer objective is evaluated.
        pullback: a function from a cotangent of w*, such as ∂F/∂w, to its `Pullback`.
    """

    params: P
    pullback: Callable[[P], Pullback[P, H]]


class Method(Solver):
    """A method that differentiates the solution map w*(λ). A hypergradient is the pullback of ∂F/∂w, plus ∂F/∂λ.

    Write a subclass as a frozen dataclass whose fields are the options.

    Attributes:
        differentiates_steps: whether the method runs and differentiates inner steps, which needs no minimum.
    """

    differentiates_steps: ClassVar[bool] = True

    @abstractmethod
    def solve(self, level: Level[P, H], adjoint0: P | None) -> Solution[P, H]:
        """Return w* and its pullback. ``adjoint0`` is a warm start for v."""
        raise NotImplementedError

    def init(self, level: Level[P, H]) -> object:
        """Return the state that several calls can share, a tree of arrays. None: there is no state."""
        return None

    def with_state(self, state: object, layout: Layout) -> Method:
        """Return the method with a fixed result of `init`. ``layout`` is the layout of the params."""
        return self

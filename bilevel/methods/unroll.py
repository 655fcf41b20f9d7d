"""A run of inner steps, and the two ways through it: backwards with an adjoint, forwards with tangents."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, NamedTuple

from bilevel.methods.optimizers import InnerStep
from bilevel.problems.gradients import inner_grad
from bilevel.protocols import Backend, BilevelProblem, InnerDerivatives, Tree


class State(NamedTuple):
    """Where a run stands."""

    params: Tree
    optimizer: Any
    t: Any  # steps taken: a Python int where the loop is Python's


class Adjoint(NamedTuple):
    """The derivatives of F by a state, and what they add up to."""

    params: Tree  # dF/dw_t
    optimizer: Any  # dF/ds_t
    total: Tree  # −Σ dF/dg, the v that the steps add up to
    cross: Tree | None  # the λ-part of dF/dλ; None: left out


class Tangent(NamedTuple):
    """The derivatives of a state along one direction of λ."""

    hparams: Tree
    params: Tree
    optimizer: Any


@dataclass(frozen=True)
class Run:
    """The steps of an optimizer on the inner objective; step t takes the data ``batch(t)``."""

    backend: Backend
    problem: BilevelProblem
    hparams: Tree
    batch: Callable[[Any], tuple[Any, ...]]
    optimizer: InnerStep

    def start(self, params: Tree) -> State:
        """Return the state before the first step."""
        return State(params, self.optimizer.init(params), 0)

    def derivatives(self, params: Tree, t: Any) -> InnerDerivatives:
        """Return those of the inner objective as step t sees it."""
        return self.problem.derivatives(self.backend, params, self.hparams, self.batch(t))

    def step(self, s: State, grad: Tree | None = None) -> State:
        """Return the next state; ``grad``, if it is known, spares its computation."""
        if grad is None:
            grad = inner_grad(self.backend, self.problem, s.params, self.hparams, self.batch(s.t))
        return State(*self.optimizer.step(grad, s.params, s.optimizer), s.t + 1)

    def advance(self, s: State, count: int) -> State:
        """Return the state after so many steps."""
        if not count:
            return s  # saves a compilation
        return self.backend.space.scan(lambda s, _: (self.step(s), None), s, None, count)[0]

    def ascend(self, a: Adjoint, at: InnerDerivatives, kept: Any) -> Adjoint:
        """Return the adjoint before a step, from that after it and the derivatives where it was taken."""
        axpy = self.backend.space.axpy
        by_grad, by_state = self.optimizer.pullback(at.grad, kept, a.params, a.optimizer)
        return Adjoint(
            params=axpy(1.0, at.hvp(by_grad), a.params),
            optimizer=by_state,
            total=axpy(-1.0, by_grad, a.total),
            cross=None if a.cross is None else axpy(1.0, at.cross_vjp(by_grad), a.cross),
        )

    def adjoint(self, grad_params: Tree, cross: Tree | None) -> Adjoint:
        """Return the adjoint at the end."""
        return Adjoint(grad_params, self.optimizer.zero(grad_params), self.backend.space.zeros_like(grad_params), cross)


class Recording:
    """Steps that were recorded on the way, for `back`.

    With ``checkpoint``, only the states at the starts of segments are stored, and `back` runs each segment again
    (Chen et al., 2016). There are √K segments of √K steps, and fewer than √K steps left over, which come first and are
    recorded at once: no more than 3√K + 1 states live at any time, for one more gradient per step.

    With ``keep`` each step's derivatives are recorded, too, in place of being computed once more on the way back, where
    the backend ``keeps_derivatives``: in torch they hold the step's graph.
    """

    def __init__(self, run: Run, start: State, count: int, checkpoint: bool, keep: bool) -> None:
        self._run, self._space = run, run.backend.space
        self._keep = keep and run.backend.keeps_derivatives
        self._length = isqrt(count) if checkpoint else count + 1
        self._segments, self._single = divmod(count, self._length)
        state, self._steps = self._record(start, self._single)
        self._starts = None
        if self._segments:

            def segment(s: State, _: None) -> tuple[State, State]:
                return run.advance(s, self._length), s

            state, self._starts = self._space.scan(segment, state, None, self._segments)
        self.end: State = state

    def back(self, a: Adjoint) -> Adjoint:
        """Return the adjoint before the first recorded step, from that at the end."""
        if self._segments:

            def segment(a: Adjoint, start: State) -> tuple[Adjoint, None]:
                return self._ascend(a, self._record(start, self._length)[1], self._length), None

            a, _ = self._space.scan(segment, a, self._starts, self._segments, reverse=True)
        return self._ascend(a, self._steps, self._single)

    def _record(self, s: State, count: int) -> tuple[State, Any]:
        def step(s: State, _: None) -> tuple[State, tuple[State, InnerDerivatives | None]]:
            at = self._run.derivatives(s.params, s.t) if self._keep else None
            kept = s._replace(optimizer=self._run.optimizer.keep(s.optimizer))
            return self._run.step(s, None if at is None else at.grad), (kept, at)

        return self._space.scan(step, s, None, count) if count else (s, None)

    def _ascend(self, a: Adjoint, steps: Any, count: int) -> Adjoint:
        def step(a: Adjoint, stored: tuple[State, InnerDerivatives | None]) -> tuple[Adjoint, None]:
            s, at = stored
            at = self._run.derivatives(s.params, s.t) if at is None else at
            return self._run.ascend(a, at, s.optimizer), None

        return self._space.scan(step, a, steps, count, reverse=True)[0] if count else a


def push(run: Run, start: State, count: int) -> tuple[State, Any]:
    """Return the end of so many steps, and its tangents along each entry of λ, for a scan of that length.

    Forward mode (Franceschi et al., ICML 2017): the memory does not depend on the number of steps.
    """
    space, hparams = run.backend.space, run.hparams
    zeros, zero_state = space.zeros_like(start.params), run.optimizer.zero(start.params)
    entries = space.size(hparams)
    identity = space.xp.diag(space.xp.ones_like(space.ravel(hparams)))

    def tangent(_: None, row: Any) -> tuple[None, Tangent]:
        return None, Tangent(space.unravel(row, hparams), zeros, zero_state)

    def step(carry: tuple[State, Any], _: None) -> tuple[tuple[State, Any], None]:
        s, tangents = carry
        at = run.derivatives(s.params, s.t)
        cross_jvp = at.cross_jvp
        if cross_jvp is None:
            raise TypeError(
                f'Unrolled: mode="forward" needs products u ↦ (∂²L/∂λ∂w) u, which the {run.backend.name} backend does '
                'not have (InnerDerivatives.cross_jvp). Use mode="reverse".'
            )

        def move(_: None, z: Tangent) -> tuple[None, Tangent]:
            d_grad = space.axpy(1.0, cross_jvp(z.hparams), at.hvp(z.params))
            moved = run.optimizer.pushforward(at.grad, s.optimizer, d_grad, z.params, z.optimizer)
            return None, Tangent(z.hparams, *moved)

        return (run.step(s, at.grad), space.scan(move, None, tangents, entries)[1]), None

    tangents = space.scan(tangent, None, identity, entries)[1]
    return space.scan(step, (start, tangents), None, count)[0]


def ascend_at(run: Run, end: State, count: int, a: Adjoint, same_data: bool) -> Adjoint:
    """Return the adjoint before so many steps, as if all had been taken at the end of the run."""
    kept, at_end = run.optimizer.keep(end.optimizer), run.derivatives(end.params, 0) if same_data else None

    def step(carry: tuple[Adjoint, Any], _: None) -> tuple[tuple[Adjoint, Any], None]:
        a, t = carry
        at = run.derivatives(end.params, t) if at_end is None else at_end
        return (run.ascend(a, at, kept), t - 1), None

    return run.backend.space.scan(step, (a, end.t - 1), None, count)[0][0]

"""A run of inner steps, with reverse and forward differentiation.

The symbols are the same as in `InnerStep`: w are params, s is the optimizer's state, and g is the gradient ∂L/∂w.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any, Generic, NamedTuple

from bilevel.linearization import Dependence, LinearizedMap
from bilevel.methods.method import Level
from bilevel.methods.optimizers import InnerStep
from bilevel.spaces.array import Args, Array, H, P
from bilevel.spaces.space import Space


class State(NamedTuple, Generic[P]):
    """The state of a run."""

    params: P
    optimizer: Any
    t: Any  # number of steps, a Python int in a Python loop


class Adjoint(NamedTuple, Generic[P, H]):
    """The derivatives of F with respect to the state before step t, and sums over the steps from t on."""

    params: P  # dF/dw_t
    optimizer: Any  # dF/ds_t
    total: P  # −Σ dF/dg, which corresponds to v of the implicit method
    cross: H | None  # Σ (∂g/∂λ)ᵀ dF/dg, the indirect part of dF/dλ. None: zero


class Tangent(NamedTuple, Generic[P, H]):
    """The derivatives of a state along one direction of λ."""

    hparams: H  # the direction
    params: P
    optimizer: Any


@dataclass(frozen=True)
class Run(Generic[P, H]):
    """The steps of an optimizer on the inner objective. Step t takes the data ``batch(t)``.

    ``first_grad`` is ∂L/∂w of step 0.
    """

    level: Level[P, H]
    space: Space[P]
    of_hparams: Space[H]
    batch: Callable[[Array | int], Args]
    optimizer: InnerStep[P, Any, Any, Any]
    first_grad: P

    def start(self, params: P) -> State[P]:
        """Return the state before the first step."""
        return State(params, self.optimizer.init(params), 0)

    def linearize(self, params: P, t: Array | int) -> LinearizedMap[P, H]:
        """Linearize the inner problem of step t."""
        return self.level.linearize(self.batch(t), params)

    def step(self, s: State[P], grad: P | None = None) -> State[P]:
        """Return the next state. If ``grad`` is given, the gradient is not computed again."""
        if grad is None and isinstance(s.t, int) and s.t == 0:
            grad = self.first_grad
        if grad is None:
            level = self.level
            _, grad = level.problem.value_and_residual(level.backend, s.params, level.hparams, self.batch(s.t))
        return State(*self.optimizer.step(grad, s.params, s.optimizer), s.t + 1)

    def advance(self, s: State[P], count: int) -> State[P]:
        """Return the state after ``count`` steps."""
        # Without steps, no scan: this saves a compilation.
        return self.space.scan(lambda s, _: (self.step(s), None), s, None, count)[0] if count else s

    def backward_step(
        self, a: Adjoint[P, H], at: LinearizedMap[P, H], kept: Any, with_cross: bool = True
    ) -> Adjoint[P, H]:
        """Return the adjoint before a step, from the adjoint ``a`` after it.

        ``at`` is the inner problem, linearized at the w of the step. ``kept`` is `InnerStep.keep` of its s.
        """
        axpy = self.space.axpy
        by_grad, by_state = self.optimizer.pullback(at.residual, kept, a.params, a.optimizer)
        product, cross = at.vjp(by_grad) if with_cross else (at.vjp_params(by_grad), None)
        if cross is not None and a.cross is not None:
            cross = self.of_hparams.axpy(1.0, cross, a.cross)
        return Adjoint(
            params=axpy(1.0, product, a.params),
            optimizer=by_state,
            total=axpy(-1.0, by_grad, a.total),
            cross=a.cross if cross is None else cross,
        )

    def adjoint(self, cotangent: P, cross: H | None) -> Adjoint[P, H]:
        """Return the adjoint after the last step: ``cotangent`` is dF/dw there, and ``cross`` is zero."""
        return Adjoint(cotangent, self.optimizer.zero(cotangent), self.space.zeros(), cross)


class Recording(Generic[P, H]):
    """Recorded steps, for `back`.

    With ``checkpoint``, the K steps are divided into segments of √K steps. Only the states at the starts of segments
    are stored, and `back` runs each segment again (Chen et al., 2016). Fewer than √K steps remain. They come before
    the segments, and are recorded immediately. At most 3√K + 1 states are stored at a time, for one more gradient per
    step.

    With ``first``, the linearized inner problem of step 0, the linearization of each step is also recorded. Otherwise
    `back` computes it again. In torch it holds the graph of the step.

    After `back`, ``used`` tells on which leaves the first recorded step depends.
    """

    def __init__(
        self, run: Run[P, H], start: State[P], count: int, checkpoint: bool, first: LinearizedMap[P, H] | None
    ) -> None:
        self._run, self._space, self._first = run, run.space, first
        # In place of residuals that are not needed, so that their memory is free.
        self._zeros = None if first is None else run.space.zeros(shared=True)
        self.used: Dependence | None = None
        # Without checkpoints, a segment would be longer than the run. So there is none, and all steps remain.
        self._length = isqrt(count) if checkpoint else count + 1
        self._segments, self._single = divmod(count, self._length)
        state, self._steps = self._record(start, self._single)
        self._starts = None
        if self._segments:

            def segment(s: State[P], _: None) -> tuple[State[P], State[P]]:
                return run.advance(s, self._length), s

            state, self._starts = self._space.scan(segment, state, None, self._segments)
        self.end: State[P] = state

    def back(self, a: Adjoint[P, H]) -> Adjoint[P, H]:
        """Return the adjoint before the first recorded step, from the adjoint at the end."""
        if self._segments:

            def segment(a: Adjoint[P, H], start: State[P]) -> tuple[Adjoint[P, H], None]:
                return self._backward(a, self._record(start, self._length)[1], self._length), None

            a, _ = self._space.scan(segment, a, self._starts, self._segments, reverse=True)
        return self._backward(a, self._steps, self._single)

    def _record(self, s: State[P], count: int) -> tuple[State[P], Any]:
        def step(s: State[P], _: None) -> tuple[State[P], tuple[State[P], LinearizedMap[P, H] | None]]:
            at = None if self._first is None else self._first if s.t == 0 else self._run.linearize(s.params, s.t)
            optimizer = self._run.optimizer
            after, kept = self._run.step(s, at and at.residual), s._replace(optimizer=optimizer.keep(s.optimizer))
            if at is not None and self._zeros is not None and optimizer.linear:
                at = at._replace(residual=self._zeros)
            return after, (kept, at)

        return self._space.scan(step, s, None, count) if count else (s, None)

    def _backward(self, a: Adjoint[P, H], steps: object, count: int) -> Adjoint[P, H]:
        def step(a: Adjoint[P, H], stored: tuple[State[P], LinearizedMap[P, H] | None]) -> tuple[Adjoint[P, H], None]:
            s, at = stored
            at = self._run.linearize(s.params, s.t) if at is None else at
            a = self._run.backward_step(a, at, s.optimizer)
            self.used = None if at.dependence is None else at.dependence()  # it costs nothing after a product
            return a, None

        return self._space.scan(step, a, steps, count, reverse=True)[0] if count else a


def forward_tangents(run: Run[P, H], start: State[P], count: int) -> tuple[State[P], object]:
    """Return the end of ``count`` steps, and the xs of a scan over its `Tangent` along each entry of λ.

    Forward mode (Franceschi et al., ICML 2017): the memory does not depend on the number of steps.
    """
    space, of_hparams = run.space, run.of_hparams
    zeros, zero_state = space.zeros(), run.optimizer.zero(start.params)
    identity = space.leaf_xp.diag(space.leaf_xp.ones_like(of_hparams.ravel(of_hparams.like)))

    def tangent(_: None, row: Array) -> tuple[None, Tangent[P, H]]:
        return None, Tangent(of_hparams.unravel(row), zeros, zero_state)

    def step(carry: tuple[State[P], Any], _: None) -> tuple[tuple[State[P], Any], None]:
        s, tangents = carry
        at = run.linearize(s.params, s.t)
        jvp_hparams = at.jvp_hparams
        if jvp_hparams is None:
            raise TypeError(
                f'Unrolled: mode="forward" needs products u ↦ (∂²L/∂λ∂w) u, which the {run.level.backend.name} backend '
                'does not have (LinearizedMap.jvp_hparams). Use mode="reverse".'
            )

        def move(_: None, z: Tangent[P, H]) -> tuple[None, Tangent[P, H]]:
            d_grad = space.axpy(1.0, jvp_hparams(z.hparams), at.vjp_params(z.params))
            moved = run.optimizer.pushforward(at.residual, s.optimizer, d_grad, z.params, z.optimizer)
            return None, Tangent(z.hparams, *moved)

        return (run.step(s, at.residual), space.scan(move, None, tangents, of_hparams.size)[1]), None

    tangents = space.scan(tangent, None, identity, of_hparams.size)[1]
    return space.scan(step, (start, tangents), None, count)[0]


def backward_at(run: Run[P, H], end: State[P], count: int, a: Adjoint[P, H], same_data: bool) -> Adjoint[P, H]:
    """Return the adjoint before ``count`` steps from the adjoint ``a`` after them, as if all started at ``end``.

    With ``same_data``, all steps have one batch, so the inner problem is linearized only once.
    """
    kept, at_end = run.optimizer.keep(end.optimizer), run.linearize(end.params, 0) if same_data else None

    def step(carry: tuple[Adjoint[P, H], Any], _: None) -> tuple[tuple[Adjoint[P, H], Any], None]:
        a, t = carry
        at = run.linearize(end.params, t) if at_end is None else at_end
        return (run.backward_step(a, at, kept, with_cross=False), t - 1), None

    return run.space.scan(step, (a, end.t - 1), None, count)[0][0]

"""Differentiation through gradient descent on the inner problem."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bilevel.problem import Problem
from bilevel.protocols import Backend, Point, Tree
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.solvers.neumann import check_step_size, safe_step
from bilevel.solvers.operators import norm
from bilevel.solvers.options import check_int, check_real, is_python_number

GROWTH = 10.0  # of dF/dw backwards through the steps; momentum alone may let it grow a little


class _Adjoint(NamedTuple):
    params: Tree  # dF/dw_t
    velocity: Tree  # dF/dm_t
    total: Tree  # −Σ dF/dm, the v that the steps add up to
    cross: Tree  # the λ-part of dF/dλ


@dataclass(frozen=True)
class Unrolled:
    """Run ``steps`` of gradient descent from ``params`` and differentiate through them, in reverse.

    m ← momentum·m + ∂L/∂w,  w ← w − step_size·m. The iterates are stored, the Hessian is not: the backward
    pass takes a Hessian-vector and a cross product at each (Franceschi et al., ICML 2017). From a stationary
    point and without momentum, K steps give the Neumann series with ``terms=K-1`` (Lorraine et al. 2020,
    theorem 2).

    ``hg.params`` is the end of the unroll, and F is taken there. ``hg.adjoint`` is the sum that plays the
    part of v. ``info.residual_norm`` is the norm of dF/dw at the start, the influence of the starting point
    that is left out; small against ``rhs_norm`` once the steps have converged. Where it exceeds ``rhs_norm`` tenfold,
    the steps drive apart what they start from (too large a step, negative curvature): the status is ``DIVERGED``.

    The inner objective is evaluated at other weights than ``params``, so it must compute with the weights it is
    handed (in PyTorch: `torch.func.functional_call`), and without randomness.

    Args:
        steps: K >= 1.
        step_size: of the inner descent, > 0. "auto": 1/(largest curvature at ``params``), by Lanczos.
        momentum: heavy-ball factor, >= 0 and < 1 to be stable.
        truncation: differentiate through the last so many steps only (Shaban et al., AISTATS 2019); None: all.
    """

    steps: int = 20
    step_size: float | Literal["auto"] = "auto"
    momentum: float = 0.0
    truncation: int | None = None

    def __post_init__(self) -> None:
        check_int(self, "steps", least=1)
        check_step_size(self)
        check_real(self, "momentum", least=0)
        if is_python_number(self.momentum) and self.momentum >= 1:
            raise ValueError(f"Unrolled.momentum: expected a number >= 0 and < 1, got {self.momentum!r}.")
        if self.truncation is not None:
            check_int(self, "truncation", least=1)

    def hypergradient(self, backend: Backend, problem: Problem, point: Point) -> Hypergradient:
        space, hparams = backend.space, point.hparams
        xp = space.xp

        def derivatives(params: Tree) -> Any:
            return backend.inner(problem, params, hparams, point.inner_args)

        at_start = derivatives(point.params)
        influences = at_start.cross_vjp(space.zeros_like(point.params)) is not None
        alpha = self.step_size
        if isinstance(alpha, str):
            alpha = safe_step(at_start.hvp, point.params, space)
        del at_start  # and with it, in torch, the graph

        def descend(state: tuple[Tree, Tree], _: None) -> tuple[tuple[Tree, Tree], Tree]:
            params, velocity = state
            velocity = space.axpy(self.momentum, velocity, derivatives(params).grad)
            return (space.axpy(-alpha, velocity, params), velocity), params

        kept = self.steps if self.truncation is None else min(self.truncation, self.steps)
        state = (point.params, space.zeros_like(point.params))
        state, _ = space.scan(lambda s, x: (descend(s, x)[0], None), state, None, self.steps - kept)
        (params, _), iterates = space.scan(descend, state, None, kept)

        value, grad_params, grad_hparams = backend.outer(problem, params, hparams, point.outer_args)

        def ascend(a: _Adjoint, iterate: Tree) -> tuple[_Adjoint, None]:
            at = derivatives(iterate)
            velocity = space.axpy(-alpha, a.params, a.velocity)
            return _Adjoint(
                params=space.axpy(1.0, at.hvp(velocity), a.params),
                velocity=space.scale(self.momentum, velocity),
                total=space.axpy(-1.0, velocity, a.total),
                cross=space.axpy(1.0, at.cross_vjp(velocity), a.cross) if influences else None,
            ), None

        zeros = space.zeros_like(grad_params)
        start = _Adjoint(grad_params, zeros, zeros, space.zeros_like(hparams) if influences else None)
        a, _ = space.scan(ascend, start, iterates, kept, reverse=True)

        grad = grad_hparams
        if influences:
            grad = a.cross if grad_hparams is None else space.axpy(1.0, a.cross, grad_hparams)
        left = norm(a.params, space)
        steps = xp.full_like(left, self.steps, dtype=xp.int32)
        rhs_norm = norm(grad_params, space)
        status = xp.where(left > GROWTH * rhs_norm, int(Status.DIVERGED), xp.full_like(steps, int(Status.CONVERGED)))
        status = xp.where(xp.isfinite(left), status, int(Status.NON_FINITE))
        info = SolverInfo(steps, left, rhs_norm, status)
        return Hypergradient(grad, value, a.total, params, info)

"""Differentiation through the steps of an optimizer on the inner objective."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from typing_extensions import override

from bilevel.linear_solvers import advice
from bilevel.linear_solvers.neumann import safe_step
from bilevel.linearization import Dependence, LinearizedMap
from bilevel.methods.method import Level, Method, Pullback, Solution
from bilevel.methods.optimizers import Adam, Descent, HeavyBall, InnerStep
from bilevel.methods.unroll import Adjoint, Recording, Run, State, Tangent, backward_at, forward_tangents
from bilevel.operators.lanczos import Spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.options import check_choice, check_int, check_real, check_step_size, is_python_value
from bilevel.problems.protocols import is_equation, is_indefinite
from bilevel.results import SolverInfo, Status
from bilevel.spaces.array import H, Number, P
from bilevel.spaces.space import Layout, Space

GROWTH = 10.0  # of dF/dw, backwards through the steps, at most. Momentum may cause a small growth
MANY_STEPS = 100  # from this number on, the iterates take more memory than the graph of a step
MANY_HPARAMS = 100  # above this number, reverse mode is always cheaper
ADAM_STEP_SIZE = 1e-3


@dataclass(frozen=True)
class Unrolled(Method):
    """Run ``steps`` steps of an optimizer from ``params`` and differentiate through them.

    The result is the derivative of these steps with respect to ``hparams``, at any distance from a minimum. Options are
    not differentiated. To tune a learning rate or momentum, write the step as a `FixedPoint` that depends on it, and
    use ``step_size=1.0``. ``optimizer`` is one of:

    - "descent": m ← momentum·m + ∂L/∂w, w ← w − step_size·m. From a stationary point and without momentum, K steps
      give the Neumann series with ``terms=K-1`` (Lorraine et al., AISTATS 2020, theorem 2).
    - "adam" (Kingma & Ba, ICLR 2015), in the arithmetic of `torch.optim.Adam` and optax. If gradients are near zero,
      the derivative is large: up to step_size/eps per unit of gradient. A larger ``eps`` smooths it. It is finite even
      if all gradients are zero. The averages have the dtype of ``params``. Half precision is too coarse for them.

    ``mode`` is one of the following, with the same result to rounding:

    - "reverse": store the iterates, and go back with one Hessian-vector and one cross product per step (Franceschi et
      al., ICML 2017). The number of hyperparameters is not limited. Each step takes two gradients, or three with
      checkpoints, and two products.
    - "forward": compute dw/dλ along the steps, with one tangent for each of at most 100 entries of ``hparams``. The
      memory does not depend on ``steps``. Each step takes one gradient, two products per entry, and one more product.
      With the numpy backend, the inner objective needs one more method: ``cross_jvp``, u ↦ (∂²L/∂λ∂w) u.

    If ``inner_args`` is a list of tuples, step t takes batch t modulo their number.

    ``hg.params`` is the end of the unroll, where F is evaluated. ``hg.adjoint`` is the sum that corresponds to v.
    ``info.residual_norm`` is the norm of dF/dw at the start, which measures the influence of the starting point. It is
    small against ``rhs_norm`` once the steps have converged. If it exceeds ``rhs_norm`` tenfold, the status is
    ``DIVERGED``: the step is too large, or the curvature is negative.

    Forward mode computes ``hg.adjoint`` and ``info.residual_norm`` as if all steps started at ``hg.params``. This v is
    an equally good warm start, but ``hg.grad`` does not depend on it. If all steps have the same data,
    ``info.residual_norm`` is the norm of ∂F/∂w − (∂²L/∂w²) v.

    The inner objective is evaluated at other weights than ``params``. So it must compute with its arguments (in
    PyTorch: `torch.func.functional_call`), and without randomness.

    Args:
        steps: K >= 1.
        step_size: > 0. "auto": for descent, 1/(largest curvature at ``params``), by Lanczos' method on the first batch;
            for Adam, 0.001, the default of its authors.
        momentum: heavy-ball factor of descent, >= 0 and < 1.
        mode: "reverse" or "forward".
        truncation: number of steps at the end to differentiate (Shaban et al., AISTATS 2019). None: all.
        checkpoint: what reverse mode stores, with the same result. True: some 3√K states instead of K; the steps
            between them run again (Chen et al., 2016). False: everything. In PyTorch, this includes the graph of each
            step: it saves a gradient per step and takes more memory than autograd. "auto": the iterates, or checkpoints
            for 100 steps or more. Fewer iterates seldom take more memory than one step.
        optimizer: "descent" or "adam".
        beta1: Adam's factor for the average of gradients, >= 0 and < 1.
        beta2: Adam's factor for the average of squared gradients, >= 0 and < 1.
        eps: Adam's addition to the root of the average of squared gradients, > 0.

    Raises:
        TypeError, ValueError: for options that are out of range or contradict each other. When called in forward mode:
            for more than 100 hyperparameters, a fixed point, or a missing ``cross_jvp``.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.eye(1), coupling=np.eye(1), target=np.zeros(1))
    >>> for mode in ("reverse", "forward"):  # w after three steps is (1 - 1/8) λ
    ...     solver = bl.Unrolled(steps=3, step_size=0.5, mode=mode)
    ...     bl.hypergradient(problem, np.zeros(1), np.ones(1), solver=solver).grad
    array([0.765625])
    array([0.765625])
    """

    steps: int = 20
    step_size: float | Literal["auto"] = "auto"
    momentum: float = 0.0
    mode: Literal["reverse", "forward"] = "reverse"
    truncation: int | None = None
    checkpoint: bool | Literal["auto"] = "auto"
    optimizer: Literal["descent", "adam"] = "descent"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_int(self, "steps", least=1)
        check_step_size(self)
        check_real(self, "momentum", "beta1", "beta2", below=1)
        check_real(self, "eps", above=0)
        if self.truncation is not None:
            check_int(self, "truncation", least=1)
        check_choice("Unrolled.mode", self.mode, ("reverse", "forward"))
        check_choice("Unrolled.checkpoint", self.checkpoint, (True, False, "auto"))
        check_choice("Unrolled.optimizer", self.optimizer, ("descent", "adam"))
        if self.mode == "forward" and self.checkpoint is True:
            raise ValueError('Unrolled.checkpoint: mode="forward" stores no iterates; leave checkpoint out.')
        idle = ("momentum",) if self.optimizer == "adam" else ("beta1", "beta2", "eps")
        for option, default in ((field.name, field.default) for field in fields(self) if field.name in idle):
            value = getattr(self, option)
            if is_python_value(value) and value != default:
                raise ValueError(f'Unrolled.{option}: optimizer="{self.optimizer}" has no {option}; leave it out.')

    @override
    def solve(self, level: Level[P, H], adjoint0: P | None) -> Solution[P, H]:
        if is_indefinite(level.problem):
            raise TypeError(
                "Unrolled: the steps of an optimizer do not converge to the solution of a bl.Constrained, which is a "
                'saddle point of its Lagrangian. Use solver="minres" or "exact". For a set with a projection, use '
                "bl.Projected."
            )
        return (self._reverse if self.mode == "reverse" else self._forward)(level)

    @override
    def init(self, level: Level[P, H]) -> Number | None:
        """Return the automatic step size of descent."""
        auto = isinstance(self.step_size, str) and self.optimizer == "descent"
        return safe_step(level.operator(level.linearize())) if auto else None

    @override
    def with_state(self, state: object, layout: Layout) -> Self:
        return self if state is None else replace(self, step_size=state)

    @override
    def explain(self, info: SolverInfo, symmetric: bool, curvature: Spectrum[float] | None) -> str:
        if info.status == Status.NON_FINITE:
            return advice.NON_FINITE
        if self.optimizer == "adam":
            return (
                "diverged: Adam's steps magnify differences between starting points. Use a smaller step_size, a larger "
                "eps (for small gradients, its step is close to a sign function), or truncation."
            )
        return advice.diverged(self.fixed_damping, curvature) if symmetric else advice.NO_CONTRACTION

    def _run(self, level: Level[P, H], at_start: LinearizedMap[P, H]) -> tuple[Run[P, H], State[P], int]:
        """Return the run, its state before the steps to differentiate, and their number."""
        space, of_hparams = level.space, level.backend.space(level.hparams)
        step = self._optimizer_step(level, at_start, space)
        run = Run(level, space, of_hparams, space.sequence(level.batches), step, at_start.residual)
        count = self.steps if self.truncation is None else min(self.truncation, self.steps)
        return run, run.advance(run.start(level.params), self.steps - count), count

    def _optimizer_step(
        self, level: Level[P, H], at: LinearizedMap[P, H], space: Space[P]
    ) -> InnerStep[P, Any, Any, Any]:
        step_size: Number = ADAM_STEP_SIZE
        if not isinstance(self.step_size, str):
            step_size = self.step_size
        elif self.optimizer == "descent":
            step_size = safe_step(LinearOperator(space, at.vjp_params, not is_equation(level.problem)))
        if self.optimizer == "adam":
            return Adam(space, step_size, self.beta1, self.beta2, self.eps)
        if is_python_value(self.momentum) and self.momentum == 0:
            return Descent(space, step_size)
        return HeavyBall(space, step_size, self.momentum)

    def _reverse(self, level: Level[P, H]) -> Solution[P, H]:
        at_start = level.linearize()
        run, start, count = self._run(level, at_start)
        checkpoint = count >= MANY_STEPS if isinstance(self.checkpoint, str) else self.checkpoint
        keep = self.checkpoint is False and level.backend.can_store_graphs
        first = at_start if keep else None
        # A compiled loop has a total of a fixed structure. There, the first map tells it, and takes no product for it.
        zero = run.of_hparams.zeros() if level.backend.compiles and _has_influence(run, at_start) else None
        del at_start  # it may hold a graph
        recording = Recording(run, start, count, checkpoint, first)

        def pullback(cotangent: P) -> Pullback[P, H]:
            a = recording.back(run.adjoint(cotangent, zero))
            return Pullback(a.cross, a.total, self._info(a, cotangent, run.space), _of_a_run(recording.used))

        return Solution(recording.end.params, pullback)

    def _forward(self, level: Level[P, H]) -> Solution[P, H]:
        _check_forward(level)
        at_start = level.linearize()
        run, start, count = self._run(level, at_start)
        space, of_hparams = run.space, run.of_hparams
        has_influence = _has_influence(run, at_start)
        used = None if at_start.dependence is None else at_start.dependence()
        end, tangents = forward_tangents(run, start, count) if has_influence else (run.advance(start, count), None)

        def pullback(cotangent: P) -> Pullback[P, H]:
            def add(grad: H, z: Tangent[P, H]) -> tuple[H, None]:
                return of_hparams.axpy(space.dot(cotangent, z.params), z.hparams, grad), None

            indirect = space.scan(add, of_hparams.zeros(), tangents, of_hparams.size)[0] if has_influence else None
            a = backward_at(run, end, count, run.adjoint(cotangent, None), same_data=len(run.level.batches) == 1)
            return Pullback(indirect, a.total, self._info(a, cotangent, space), _of_a_run(used))

        return Solution(end.params, pullback)

    def _info(self, a: Adjoint[P, H], cotangent: P, space: Space[P]) -> SolverInfo:
        xp, at_start, at_end = space.xp, space.norm(a.params), space.norm(cotangent)  # the norms of dF/dw
        steps = xp.full_like(at_start, self.steps, dtype=xp.int32)
        status = xp.where(at_start > GROWTH * at_end, int(Status.DIVERGED), xp.full_like(steps, int(Status.CONVERGED)))
        status = xp.where(xp.isfinite(at_start), status, int(Status.NON_FINITE))
        return SolverInfo(steps, residual_norm=at_start, rhs_norm=at_end, status=status)


def _has_influence(run: Run[P, H], at_start: LinearizedMap[P, H]) -> bool:
    """Return whether the steps depend on λ."""
    return at_start.vjp_hparams(run.space.zeros()) is not None


def _of_a_run(used: Dependence | None) -> Dependence | None:
    """Return the dependence of the end of a run. It depends on the start, also where no step changes it."""
    return None if used is None else used._replace(params=[True] * len(used.params))


def _check_forward(level: Level[P, H]) -> None:
    of_hparams = level.backend.space(level.hparams)
    if of_hparams.size > MANY_HPARAMS:
        raise ValueError(
            f'Unrolled: mode="forward" stores a tangent for each entry of hparams, at most {MANY_HPARAMS}, but '
            f'hparams has {of_hparams.size:,}. Use mode="reverse".'
        )
    if is_equation(level.problem):
        raise TypeError(
            'Unrolled: mode="forward" needs products with the Jacobian of the inner equation. Only products with its '
            'transpose exist, which are equal only if the inner problem is a minimization. Use mode="reverse".'
        )

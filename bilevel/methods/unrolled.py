"""Differentiation through the steps of an optimizer on the inner problem."""

from dataclasses import dataclass, fields
from typing import Literal

from bilevel.linear_solvers.neumann import check_step_size, safe_step
from bilevel.methods.optimizers import Adam, HeavyBall, InnerStep
from bilevel.methods.unroll import Adjoint, Recording, Run, State, Tangent, ascend_at, push
from bilevel.operators.combinators import norm
from bilevel.options import check_choice, check_int, check_real, is_python_value
from bilevel.protocols import Backend, BilevelProblem, InnerDerivatives, NonSymmetric, Point, Tree, VectorSpace
from bilevel.results import Hypergradient, SolverInfo, Status

GROWTH = 10.0  # of dF/dw backwards through the steps; momentum alone may let it grow a little
MANY_STEPS = 100  # from which on their iterates, not one step's graph, are what fills the memory
MANY_HPARAMS = 100  # beyond which reverse mode is sure to be cheaper
ADAM_STEP_SIZE = 1e-3


@dataclass(frozen=True)
class Unrolled:
    """Run ``steps`` steps of an optimizer from ``params`` and differentiate through them.

    The derivative is that of the program, at any distance from a minimum. It is one by ``hparams``, not by the options
    here: to tune a learning rate or a momentum, write the step as a function of it, a `FixedPoint`, which
    ``step_size=1.0`` repeats. ``optimizer`` is one of:

    - "descent": m ← momentum·m + ∂L/∂w, w ← w − step_size·m. From a stationary point and without momentum, K steps
      give the Neumann series with ``terms=K-1`` (Lorraine et al., AISTATS 2020, theorem 2).
    - "adam" (Kingma & Ba, ICLR 2015), in the arithmetic of `torch.optim.Adam` and optax. Where gradients are near zero
      its step is about a sign, and the derivative large: up to step_size/eps per unit of gradient. A larger ``eps``
      smooths it. Gradients that were all exactly zero have that derivative too, never a nan.
      The averages have the dtype of ``params``; half precision is too coarse for their derivatives.

    ``mode`` is one of, with the same result to rounding:

    - "reverse": store the iterates, never a Hessian, and go back through them with one Hessian-vector and one cross
      product each (Franceschi et al., ICML 2017); for any number of hyperparameters. Per step: two gradients, or three
      with checkpoints, and two products.
    - "forward": carry dw/dλ along, one tangent for each of at most 100 entries of ``hparams``; memory does not depend
      on ``steps``. Per step: one gradient, two products per entry, and one more. The numpy backend then asks for one
      more method of the inner objective: ``cross_jvp``, u ↦ (∂²L/∂λ∂w) u.

    Where ``inner_args`` is a list of tuples, step t takes batch t modulo their number.

    ``hg.params`` is the end of the unroll, and F is taken there. ``hg.adjoint`` is the sum that plays the part of v.
    ``info.residual_norm`` is the norm of dF/dw at the start, the influence of the starting point that is left out;
    small against ``rhs_norm`` once the steps have converged. Where it exceeds ``rhs_norm`` tenfold, the steps drive
    apart what they start from (too large a step, negative curvature): the status is ``DIVERGED``.

    Forward mode has nothing to read these two off. There they are what as many steps taken at ``hg.params`` itself
    would give: v as good a warm start, though ``hg.grad`` is not made of it, and, if all steps have the same data, the
    norm of ∂F/∂w − (∂²L/∂w²) v.

    The inner objective is evaluated at other weights than ``params``, so it must compute with the weights it is
    handed (in PyTorch: `torch.func.functional_call`), and without randomness.

    Args:
        steps: K >= 1.
        step_size: > 0. "auto": for descent 1/(largest curvature at ``params``), by Lanczos, on the first batch; for
            Adam 0.001, its authors' default.
        momentum: heavy-ball factor of descent, >= 0 and < 1.
        mode: "reverse" or "forward".
        truncation: differentiate through the last so many steps only (Shaban et al., AISTATS 2019); None: all.
        checkpoint: in reverse mode, what to store, with the same result. True: some 3√K states instead of K, and run
            the steps between them again (Chen et al., 2016). False: all that going back needs; in PyTorch that is each
            step's graph, which spares a gradient per step and takes more memory than autograd itself. "auto": the
            iterates, or checkpoints if 100 steps or more are differentiated: the iterates of fewer seldom outweigh what
            a single step needs.
        optimizer: "descent" or "adam".
        beta1: Adam's factor for the average of gradients, >= 0 and < 1.
        beta2: Adam's factor for the average of their squares, likewise.
        eps: what Adam adds to the root of the latter, > 0.

    Raises:
        TypeError, ValueError: for options out of range or that contradict each other. When called, in forward mode: for
            more than 100 hyperparameters, a fixed point, or a missing ``cross_jvp``.

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
        for option in ("momentum", "beta1", "beta2"):
            check_real(self, option, least=0, below=1)
        check_real(self, "eps", above=0)
        if self.truncation is not None:
            check_int(self, "truncation", least=1)
        check_choice(self, "mode", ("reverse", "forward"))
        check_choice(self, "checkpoint", (True, False, "auto"))
        check_choice(self, "optimizer", ("descent", "adam"))
        if self.mode == "forward" and self.checkpoint is True:
            raise ValueError('Unrolled.checkpoint: mode="forward" stores no iterates; leave it out.')
        idle = ("momentum",) if self.optimizer == "adam" else ("beta1", "beta2", "eps")
        for option, default in ((field.name, field.default) for field in fields(self) if field.name in idle):
            value = getattr(self, option)
            if is_python_value(value) and value != default:
                raise ValueError(f'Unrolled.{option}: optimizer="{self.optimizer}" has no {option}; leave it out.')

    def hypergradient(self, backend: Backend, problem: BilevelProblem, point: Point) -> Hypergradient:
        space = backend.space
        batch = space.sequence(point.batches)

        at_start = problem.derivatives(backend, point.params, point.hparams, batch(0))
        influences = at_start.cross_vjp(space.zeros_like(point.params)) is not None
        if self.mode == "forward":
            _check_forward(backend, at_start, point.hparams)
        run = Run(backend, problem, point.hparams, batch, self._inner_step(at_start, point.params, backend))
        del at_start  # and with it, in torch, the graph

        count = self.steps if self.truncation is None else min(self.truncation, self.steps)
        start = run.advance(run.start(point.params), self.steps - count)
        differentiate = self._reverse if self.mode == "reverse" else self._forward
        return differentiate(run, start, count, point, influences)

    def _inner_step(self, at_start: InnerDerivatives, params: Tree, backend: Backend) -> InnerStep:
        space, auto = backend.space, isinstance(self.step_size, str)
        if self.optimizer == "adam":
            step_size = ADAM_STEP_SIZE if auto else self.step_size
            return Adam(space, step_size, self.beta1, self.beta2, self.eps)
        step_size = safe_step(at_start.hvp, params, space) if auto else self.step_size
        return HeavyBall(space, step_size, self.momentum)

    def _reverse(self, run: Run, start: State, count: int, point: Point, influences: bool) -> Hypergradient:
        space = run.backend.space
        checkpoint = count >= MANY_STEPS if isinstance(self.checkpoint, str) else self.checkpoint
        recording = Recording(run, start, count, checkpoint, keep=self.checkpoint is False)
        params = recording.end.params
        value, grad_params, direct = run.backend.outer(run.problem.outer, params, run.hparams, point.outer_args)
        a = recording.back(run.adjoint(grad_params, space.zeros_like(run.hparams) if influences else None))
        return Hypergradient(_sum(a.cross, direct, space), value, a.total, params, self._info(a, grad_params, space))

    def _forward(self, run: Run, start: State, count: int, point: Point, influences: bool) -> Hypergradient:
        space = run.backend.space
        end, tangents = push(run, start, count) if influences else (run.advance(start, count), None)
        value, grad_params, direct = run.backend.outer(run.problem.outer, end.params, run.hparams, point.outer_args)

        def add(grad: Tree, z: Tangent) -> tuple[Tree, None]:
            return space.axpy(space.dot(grad_params, z.params), z.hparams, grad), None

        indirect = None
        if influences:
            indirect, _ = space.scan(add, space.zeros_like(run.hparams), tangents, space.size(run.hparams))
        a = ascend_at(run, end, count, run.adjoint(grad_params, None), same_data=len(point.batches) == 1)
        grad = _sum(indirect, direct, space)
        return Hypergradient(grad, value, a.total, end.params, self._info(a, grad_params, space))

    def _info(self, a: Adjoint, grad_params: Tree, space: VectorSpace) -> SolverInfo:
        xp, left, rhs_norm = space.xp, norm(a.params, space), norm(grad_params, space)
        steps = xp.full_like(left, self.steps, dtype=xp.int32)
        status = xp.where(left > GROWTH * rhs_norm, int(Status.DIVERGED), xp.full_like(steps, int(Status.CONVERGED)))
        status = xp.where(xp.isfinite(left), status, int(Status.NON_FINITE))
        return SolverInfo(steps, left, rhs_norm, status)


def _sum(indirect: Tree | None, direct: Tree | None, space: VectorSpace) -> Tree | None:
    if indirect is None or direct is None:
        return direct if indirect is None else indirect
    return space.axpy(1.0, indirect, direct)


def _check_forward(backend: Backend, at: InnerDerivatives, hparams: Tree) -> None:
    entries = backend.space.size(hparams)
    if entries > MANY_HPARAMS:
        raise ValueError(
            f'Unrolled: mode="forward" carries a copy of params for each entry of hparams, at most {MANY_HPARAMS}, but '
            f'hparams has {entries:,}. Use mode="reverse".'
        )
    if isinstance(at.hvp, NonSymmetric):
        raise TypeError(
            'Unrolled: mode="forward" needs products with the Jacobian of the inner equations, and has those with its '
            'transpose, which are others unless the inner problem is a minimization. Use mode="reverse".'
        )

"""The hypergradient by finite differences of the re-solved problem: a reference for solvers and derivatives."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from bilevel.backend import Backend
from bilevel.errors import SolverError
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.spaces.array import Args, H
from bilevel.testing.host import HostProblem, prepare
from bilevel.testing.newton import InnerSolver
from bilevel.testing.retraining import Fit, Retraining, check_retraining

MAX_HPARAMS = 200
SHORTEST = 1e-4  # the shortest step of differences of a training, relative to λ


class Solutions(Protocol):
    """The solutions of an inner problem at the caller's λ (``w``, of shape (n,)) and nearby."""

    @property
    def host(self) -> HostProblem[Any, Any]: ...
    @property
    def w(self) -> np.ndarray: ...
    def follow(self, lam: np.ndarray) -> np.ndarray:
        """Return the solution at λ, of shape (n,)."""
        ...


class Slope(NamedTuple):
    """A derivative and a bound of its error."""

    value: float
    noise: float


def slope(function: Callable[[float], float], scale: float, eps: float, shortest: float | None = None) -> Slope:
    """Return f'(0) by central differences with steps over decades.

    The steps h decrease from ``scale``/10 to ``shortest``·``scale``, by default √eps·``scale``, by factors of √10. For
    long steps the differences change with h; for short steps they scatter. The value is the middle one of the three
    neighbours with the least noise. The noise is the larger of their spread and of the scatter in f at shorter steps,
    divided by h, plus the rounding error of f and its argument: a few eps·(|f| + ``scale``·|f(±h) − f(0)|/h)/h.

    Args:
        function: f, of a real number. Steps h with a `SolverError` or a nan are left out.
        scale: the scale of the argument.
        eps: the machine epsilon of the dtype of f's computation.

    Raises:
        SolverError: if fewer than three neighbours are left. Its cause is the last error of f.

    >>> slope(np.sin, 1.0, 2e-16).noise < 1e-9
    True
    """
    steps = scale * 10 ** np.arange(-1, 0.5 * np.log10(eps) if shortest is None else np.log10(shortest), -0.5)
    if len(steps) < 3:
        raise SolverError(f"finite differences need float32 or float64, got a machine epsilon of {eps:.2g}.")
    center = function(0.0)
    estimates, rounding, cause = np.full(len(steps), np.nan), np.zeros(len(steps)), None
    for i, h in enumerate(steps):
        try:
            high, low = function(h), function(-h)
        except SolverError as error:
            cause = error
            continue
        estimates[i] = (high - low) / (2 * h)
        change = max(abs(high - center), abs(low - center))
        rounding[i] = 4 * eps * (max(abs(high), abs(low)) + change * scale / h) / h
    neighbours = np.stack([estimates[:-2], estimates[1:-1], estimates[2:]])
    spread, h = neighbours.max(axis=0) - neighbours.min(axis=0), steps[1:-1]
    scatter = np.maximum.accumulate(np.nan_to_num(spread * h, posinf=0.0)[::-1])[::-1]
    noise = np.maximum(spread, scatter / h) + rounding[1:-1]
    if not np.isfinite(noise).any():
        why = cause or "the objective is nan or infinite there."
        raise SolverError(f"no finite differences with steps from {steps[0]:.2g} to {steps[-1]:.2g}: {why}") from cause
    best = int(np.nanargmin(noise))
    return Slope(float(neighbours[1, best]), float(noise[best]))


def solutions(host: HostProblem[Any, Any], fit: Fit | None) -> Solutions:
    """Return solutions by Newton's method, or by the user's training."""
    return InnerSolver(host) if fit is None else Retraining(host, fit)


def directional_derivatives(solver: Solutions, directions: Iterable[np.ndarray], follow: bool = True) -> list[Slope]:
    """Return d/dt F(w*(λ + t d), λ + t d) at t = 0 for each direction d, of shape (m,).

    Without ``follow``, w* stays constant, and the result is the direct term (∂F/∂λ)·d.
    """
    host, shortest = solver.host, SHORTEST if follow and isinstance(solver, Retraining) else None

    def along(d: np.ndarray) -> Slope:
        def outer(t: float) -> float:
            lam = host.lam + t * d
            return host.outer(solver.follow(lam) if follow else solver.w, lam)

        return slope(outer, step_scale(host.lam, d), host.eps, shortest)

    return [along(d) for d in directions]


def step_scale(x: np.ndarray, d: np.ndarray) -> float:
    """Return the t for which t·d is about as large as x where d is not zero, or as large as one if x = 0."""
    typical = np.linalg.norm(d * x) / np.linalg.norm(d) or np.linalg.norm(x) / x.size**0.5 or 1.0
    return float(typical / np.abs(d).max())


def finite_difference_hypergradient(
    problem: BilevelProblem,
    params: object,
    hparams: H,
    *,
    inner_args: Args = (),
    outer_args: Args = (),
    damping: float = 0.0,
    fit: Fit | None = None,
    backend: Backend | str | None = None,
) -> Hypergradient[Any, H]:
    """Return (F(w*(λ + h e), λ + h e) − F(w*(λ − h e), λ − h e)) / 2h for each coordinate e of λ.

    Newton's method solves the inner problem from ``params``. If it finds no minimum, SciPy's L-BFGS-B runs first. At
    each λ ± h e, Newton's method follows the minimizer to rounding. This needs the values of both objectives and ∂L/∂w.
    Hessian-vector products are checked first and only speed up the solves. The steps h cover decades, scaled to the
    size of λ; `slope` chooses among them. The model computes in its own dtype. In float32, expect about three correct
    digits, and read ``info.residual_norm``.

    Args:
        problem, params, hparams, inner_args, outer_args, backend: as in `bl.hypergradient`. ``params`` is the start.
            The objectives must compute with the arrays that are passed.
        damping: δ >= 0. Then the inner objective is L − (w − params)·∂L/∂w(params, λ) + δ/2 ‖w − params‖², whose
            minimum at λ is params and whose hypergradient is the damped one.
        fit: ``fit(hparams, params0) -> params``, your training, as in `bl.minimize`. It then takes the place of
            Newton's method, with steps from a tenth to 1e-4 of λ: about 14 trainings for each entry. Fix its seed.

    Returns:
        A `Hypergradient`: ``params`` is the re-solved w*, ``value`` is F there, ``adjoint`` is None.
        ``info.residual_norm`` is the norm of the noise in ``grad``, ``info.rhs_norm`` is the norm of ``grad``, and
        ``info.steps`` is the number of entries.

    Raises:
        TypeError, ValueError: for invalid input, more than 200 hyperparameters or 5,000 weights, or both damping and
            fit.
        SolverError: if the inner problem cannot be solved.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> finite_difference_hypergradient(problem, np.zeros(2), np.zeros(2)).grad
    array([-0.5, -0.5])
    """
    check_retraining(fit, damping)
    backend, inputs = prepare(params, hparams, inner_args, outer_args, backend, "the reference by finite differences")
    size = backend.space(hparams).size
    if size > MAX_HPARAMS:
        raise ValueError(
            f"hparams has {size:,} entries (limit: {MAX_HPARAMS}): finite differences would solve the inner problem "
            f"about {30 * size:,} times. Use exact_hypergradient, or check_hypergradient with "
            'reference="finite-differences", which tests a few random directions.'
        )
    solver = solutions(HostProblem(backend, problem, inputs, damping), fit)
    host, w = solver.host, solver.w
    slopes = directional_derivatives(solver, np.eye(size))
    grad, noise = (np.array(column) for column in zip(*slopes, strict=True))
    solved = host.at(w, host.lam)
    value = backend.outer(problem.outer, solved.params, solved.hparams, inputs.outer_args).value
    info = SolverInfo(size, float(np.linalg.norm(noise)), float(np.linalg.norm(grad)), Status.CONVERGED)
    return Hypergradient(backend.from_flat(grad, hparams), value, None, solved.params, info)

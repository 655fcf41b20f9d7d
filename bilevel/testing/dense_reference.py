"""The hypergradient by a dense solve on the host: a reference for solvers."""

import warnings
from collections.abc import Callable

import numpy as np
from scipy import linalg
from scipy.linalg import get_lapack_funcs

from bilevel.backend import Backend
from bilevel.errors import SolverError
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem, is_equation
from bilevel.results import Hypergradient, SolverInfo, Status
from bilevel.spaces.array import Args, Array, H, P
from bilevel.testing.host import check_damping, precision, prepare, with_true_hessian


def exact_hypergradient(
    problem: BilevelProblem,
    params: P,
    hparams: H,
    *,
    inner_args: Args = (),
    outer_args: Args = (),
    damping: float = 0.0,
    backend: Backend | str | None = None,
) -> Hypergradient[P, H]:
    """Return ∂F/∂λ − (∂²L/∂λ∂w)ᵀ v with v = [∂²L/∂w² + damping I]⁻¹ ∂F/∂w from the dense Hessian.

    n Hessian-vector products in the model's dtype give the Hessian, of shape (n, n). LAPACK solves the system on the
    host in float64. The derivatives come from the backend, as in `bl.hypergradient`. To check the derivatives too, use
    `finite_difference_hypergradient`. For a Gauss-Newton problem, the reference uses the true Hessian, so a difference
    shows the bias of the approximation. With ``curvature="finite-differences"``, the reference uses these differences.
    For a `FixedPoint` or a `Root`, the matrix is the transposed Jacobian.

    Args:
        problem, params, hparams, inner_args, outer_args, backend: as in `bl.hypergradient`.
        damping: a number >= 0, to check a solver with the same damping.

    Returns:
        A `Hypergradient` with the dtypes and structures of ``params`` and ``hparams``.

    Raises:
        TypeError, ValueError: for invalid input, more than 5,000 weights, or a Hessian that is not symmetric.
        SolverError: if the Hessian is singular to the precision of the dtype, or not finite.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=2 * np.eye(2), coupling=np.eye(2), target=np.ones(2))
    >>> exact_hypergradient(problem, np.zeros(2), np.zeros(2)).grad
    array([-0.5, -0.5])
    """
    check_damping(damping)
    backend, inputs = prepare(params, hparams, inner_args, outer_args, backend, "the exact reference")
    eps, problem = backend.space(params).eps, with_true_hessian(problem)
    value, rhs, hessian = backend.run(_system, problem, inputs)
    b, hessian = backend.to_flat(rhs), np.asarray(backend.to_numpy(hessian), dtype=np.float64)
    if not is_equation(problem):
        check_symmetric(hessian, precision(problem, eps))
    hessian = hessian + damping * np.eye(len(b))
    v = factorize(hessian, eps)(b)
    adjoint = backend.from_flat(v, params)

    direct, cross = backend.run(_parts, problem, inputs, adjoint)
    if direct is None and cross is None:
        raise ValueError("neither objective depends on hparams, so there is no hypergradient.")
    zeros = backend.space(hparams).zeros()
    grad = backend.to_flat(zeros if direct is None else direct) - backend.to_flat(zeros if cross is None else cross)
    info = SolverInfo(
        steps=len(b),
        residual_norm=float(np.linalg.norm(b - hessian @ v)),
        rhs_norm=float(np.linalg.norm(b)),
        status=Status.CONVERGED,
    )
    return Hypergradient(backend.from_flat(grad, hparams), value, adjoint, params, info)


def factorize(hessian: np.ndarray, eps: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return b -> H⁻¹ b, for a matrix of shape (n, n) whose entries have a relative precision of eps.

    Rows and columns are first scaled to a largest entry of about one. So weights in different units do not make the
    system ill-conditioned.

    Raises:
        SolverError: if the matrix is singular to that precision, or not finite.
    """
    if not np.isfinite(hessian).all():
        raise SolverError("the Hessian of the inner objective has entries that are nan or infinite.")
    largest = np.abs(hessian).max(axis=1)
    scale = 1 / np.sqrt(np.where(largest > 0, largest, 1.0))
    scaled = scale[:, None] * hessian * scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linalg.LinAlgWarning)  # an exact zero on the diagonal: rcond is 0 then
        factors = linalg.lu_factor(scaled)
    (gecon,) = get_lapack_funcs(("gecon",), (factors[0],))
    rcond, _ = gecon(factors[0], np.abs(scaled).sum(axis=0).max())
    if not rcond > eps:
        sizes = np.linalg.svdvals(hessian)
        raise SolverError(
            "the Hessian of the inner objective is singular to the precision of its dtype: singular values from "
            f"{sizes.min():.2g} to {sizes.max():.2g}, {(largest == 0).sum()} rows of zeros, reciprocal "
            f"condition number {rcond:.2g} after scaling. A minimizer that is not isolated has no "
            "hypergradient. Add a penalty to the inner objective, or use float64. To check a damped solver, pass its "
            "damping=."
        )
    return lambda b: scale * linalg.lu_solve(factors, scale * b)


def check_symmetric(hessian: np.ndarray, eps: float) -> None:
    """Raise a ValueError if the matrix is not symmetric to a relative √eps: then it is not a Hessian."""
    gap = np.abs(hessian - hessian.T)
    if gap.max(initial=0.0) > eps**0.5 * np.abs(hessian).max(initial=0.0):
        i, j = np.unravel_index(gap.argmax(), gap.shape)
        raise ValueError(
            f"inner hvp: expected a symmetric matrix, got {hessian[i, j]:.6g} at ({i}, {j}) and "
            f"{hessian[j, i]:.6g} at ({j}, {i}). An analytic hvp is wrong, or the loss is random (dropout)."
        )


def _system(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array, P, Array]:
    params, hparams, inner_args, outer_args = inputs
    value, grad_params, *_ = backend.outer(problem.outer, params, hparams, outer_args)
    at = problem.linearize(backend, params, hparams, inner_args)
    return value, grad_params, backend.space(params).materialise(at.vjp_params)


def _parts(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], adjoint: P) -> tuple[H | None, H | None]:
    params, hparams, inner_args, outer_args = inputs
    direct = backend.outer(problem.outer, params, hparams, outer_args).grad_hparams
    return direct, problem.linearize(backend, params, hparams, inner_args).vjp_hparams(adjoint)

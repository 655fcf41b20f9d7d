"""A bilevel problem as functions of flat float64 vectors on the host, for SciPy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bilevel.diagnosis.agreement import DERIVATIVES
from bilevel.hypergradient import linearize
from bilevel.linear_solvers.exact import check_size
from bilevel.problems.gradients import inner_value_and_grad
from bilevel.problems.problem import Problem
from bilevel.protocols import Backend, BilevelProblem, Point, Tree
from bilevel.spaces.ravel import to_host
from bilevel.validation import check_point, find_backend


def prepare(
    params: Tree, hparams: Tree, inner_args: Any, outer_args: Any, backend: Any, what: str
) -> tuple[Backend, Point]:
    """Return the backend and the point, checked, and small enough for a dense Hessian."""
    found = find_backend(backend, params, hparams)
    point = Point(params, hparams, inner_args, outer_args)
    check_point(found, point)
    check_size(found.space.size(params), what)
    return found, point


def from_host(backend: Backend, array: np.ndarray, like: Tree) -> Tree:
    """Give a float64 array of shape (n,) the structure, shapes, dtypes and device of ``like``."""
    dtype = backend.to_numpy(backend.space.ravel(like)).dtype
    return backend.space.unravel(backend.from_numpy(array.astype(dtype)), like)


def with_true_hessian(problem: BilevelProblem) -> BilevelProblem:
    """Return the problem without the Gauss-Newton approximation, which a reference must not share."""
    if isinstance(problem, Problem) and problem.curvature == "gauss-newton":
        return replace(problem, curvature="hessian")
    return problem


def precision(problem: BilevelProblem, eps: float) -> float:
    """Return what products with second derivatives are known to, relative: eps, or what differences leave of it."""
    return eps**0.5 if getattr(problem, "curvature", None) == "finite-differences" else eps


class HostProblem:
    """A problem with its data: w of shape (n,) and λ of shape (m,) outside, the model's own dtype inside.

    Nothing that the user passed is evaluated again after the start: the points are new arrays.

    Raises:
        ValueError: if the objectives do not follow such new arrays.
    """

    def __init__(self, backend: Backend, problem: BilevelProblem, point: Point) -> None:
        self.backend, self.problem, self.point = backend, with_true_hessian(problem), point
        self.minimizes = hasattr(problem, "inner")  # else w* solves an equation r(w, λ) = 0
        self.w, self.lam = to_host(backend, point.params), to_host(backend, point.hparams)
        trees = (point.params, point.hparams)
        self.dtypes = [backend.to_numpy(backend.space.ravel(tree)).dtype for tree in trees]
        self.eps = backend.space.eps(trees)
        self._check_follows_arguments()

    def at(self, w: np.ndarray, lam: np.ndarray) -> Point:
        """Return the point (w, λ)."""
        params, hparams = self.point.params, self.point.hparams
        return self.point._replace(
            params=from_host(self.backend, w, params), hparams=from_host(self.backend, lam, hparams)
        )

    def inner(self, w: np.ndarray, lam: np.ndarray) -> tuple[float, np.ndarray]:
        """Return L and ∂L/∂w; of an equation ‖r‖² and r."""
        value, grad = self._evaluate(_inner, w, lam)
        return float(value), grad

    def outer(self, w: np.ndarray, lam: np.ndarray) -> float:
        """Return F."""
        return float(self._evaluate(_outer, w, lam)[0])

    def hessian(self, w: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """Return ∂²L/∂w², or ∂r/∂w, from n products with its transpose; of shape (n, n)."""
        return self._evaluate(_hessian, w, lam)[0].T

    def derivatives(self, w: np.ndarray, lam: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """Return what the backend derives at (w, λ), with the products of u, of shape (n,)."""
        return dict(zip(DERIVATIVES, self._evaluate(_derivatives_at, w, lam, u), strict=True))

    def _evaluate(self, function: Callable[..., Any], *flat: np.ndarray) -> list[np.ndarray]:
        """Call a function of a point whose trees are still flat: giving them structure compiles, too."""
        arrays = [self.backend.from_numpy(x.astype(self.dtypes[i % 2])) for i, x in enumerate(flat)]
        w, lam, u = [*arrays, None][:3]
        point = self.point._replace(params=(w, self.point.params), hparams=(lam, self.point.hparams), adjoint0=u)
        with np.errstate(all="ignore"):  # a trial step too far is no one's mistake
            found = self.backend.execute(function, None, self.problem, point)
        return [np.asarray(self.backend.to_numpy(array), dtype=np.float64) for array in found]

    def _check_follows_arguments(self) -> None:
        u = np.random.default_rng(0).standard_normal(self.w.size)
        point = self.point._replace(adjoint0=from_host(self.backend, u, self.point.params))
        given = self.backend.execute(_derivatives, None, self.problem, point)
        copied, eps = self.derivatives(self.w, self.lam, u), precision(self.problem, self.eps)
        for array, (name, copy) in zip(given, copied.items(), strict=True):
            array = np.asarray(self.backend.to_numpy(array), dtype=np.float64)
            if np.abs(array - copy).max(initial=0.0) > 10 * eps**0.5 * np.abs(array).max(initial=0.0):
                raise ValueError(
                    f"{name} changes when params and hparams are replaced by copies, so the inner problem "
                    "cannot be solved again at other hyperparameters. The objectives must compute with the "
                    "arguments that they are handed (in PyTorch by torch.func.functional_call), not with a "
                    "module's own parameters or other arrays they close over, and without dropout."
                )


def _unflatten(backend: Backend, point: Point) -> Point:
    (w, params), (lam, hparams), u = point.params, point.hparams, point.adjoint0
    unravel = backend.space.unravel
    return point._replace(
        params=unravel(w, params),
        hparams=unravel(lam, hparams),
        adjoint0=None if u is None else unravel(u, params),
    )


def _inner(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Any, Any]:
    point = _unflatten(backend, point)
    value, grad = inner_value_and_grad(backend, problem, point.params, point.hparams, point.inner_args)
    return backend.space.dot(grad, grad) if value is None else value, backend.space.ravel(grad)


def _outer(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Any]:
    point = _unflatten(backend, point)
    return (backend.outer(problem.outer, point.params, point.hparams, point.outer_args).value,)


def _hessian(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> tuple[Any]:
    point = _unflatten(backend, point)
    inner = problem.derivatives(backend, point.params, point.hparams, point.inner_args)
    return (backend.space.dense(inner.hvp, point.params),)


def _derivatives_at(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> list[Any]:
    return _derivatives(backend, solver, problem, _unflatten(backend, point))


def _derivatives(backend: Backend, solver: None, problem: BilevelProblem, point: Point) -> list[Any]:
    """Return the arrays that DERIVATIVES names."""
    lin = linearize(backend, problem, point)
    inner = problem.derivatives(backend, point.params, point.hparams, point.inner_args)
    cross, direct = (
        backend.space.zeros_like(point.hparams) if tree is None else tree
        for tree in (lin.cross_vjp(point.adjoint0), lin.grad_hparams)
    )
    return [backend.space.ravel(tree) for tree in (inner.grad, lin.hvp(point.adjoint0), cross, lin.grad_params, direct)]

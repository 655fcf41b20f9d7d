"""A bilevel problem as functions of flat float64 vectors on the host, for SciPy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic

import numpy as np

from bilevel.backend import Backend
from bilevel.inspection.derivatives import DERIVATIVES, derivatives
from bilevel.linear_solvers.exact import check_size
from bilevel.linearization import Inputs
from bilevel.problems.k_fold import KFoldProblem
from bilevel.problems.problem import Problem
from bilevel.problems.protocols import BilevelProblem, is_equation
from bilevel.spaces.array import Args, Array, H, P
from bilevel.validation import check_inputs, find_backend


def prepare(
    params: P,
    hparams: H,
    inner_args: Args,
    outer_args: Args,
    backend: Backend | str | None,
    what: str,
) -> tuple[Backend, Inputs[P, H]]:
    """Return the backend and the inputs. Raise an error if they are invalid, or too large for a dense Hessian."""
    found = find_backend(backend, params, hparams)
    check_inputs(found, params, hparams, inner_args, outer_args)
    check_size(found.space(params).size, what)
    return found, Inputs(params, hparams, inner_args, outer_args)


def with_true_hessian(problem: BilevelProblem) -> BilevelProblem:
    """Return the problem without the Gauss-Newton approximation, because a reference must be exact."""
    if isinstance(problem, KFoldProblem):
        return replace(problem, problem=with_true_hessian(problem.problem))
    if isinstance(problem, Problem) and problem.curvature == "gauss-newton":
        return replace(problem, curvature="hessian")
    return problem


def precision(problem: BilevelProblem, eps: float) -> float:
    """Return the relative precision of products with second derivatives: eps, or √eps for finite differences."""
    return eps**0.5 if problem.kind == "finite-differences" else eps


def check_damping(damping: float) -> None:
    """Raise a ValueError unless this is a finite number >= 0."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping: expected a finite number >= 0, got {damping!r}.")


class HostProblem(Generic[P, H]):
    """A problem with its data, as functions of w of shape (n,) and λ of shape (m,). It computes in the model's dtype.

    The points are new arrays, so the objectives must compute with the arrays that are passed.

    With damping δ, the inner objective is L(w, λ) − g·(w − w₀) + δ/2 ‖w − w₀‖², where g = ∂L/∂w at the caller's w₀ and
    λ₀. Its minimum at λ₀ is w₀, its Hessian is H + δI, and it has the mixed derivative of L. So its hypergradient is
    the damped one. For an equation, r has the same terms: r(w, λ) − r(w₀, λ₀) + δ (w − w₀).

    Raises:
        ValueError: if the objectives do not compute with these arrays, or for an invalid damping.
    """

    def __init__(self, backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], damping: float = 0.0) -> None:
        check_damping(damping)
        self.backend, self.problem, self.inputs = backend, with_true_hessian(problem), inputs
        self.minimizes = not is_equation(problem)  # if False, w* solves an equation r(w, λ) = 0
        self.w, self.lam = backend.to_flat(inputs.params), backend.to_flat(inputs.hparams)
        self.eps = max(backend.space(tree).eps for tree in inputs[:2])
        self._check_follows_arguments()
        self.damping = damping
        self.offset = self._evaluate(_inner, self.w, self.lam)[1] if damping else np.zeros_like(self.w)

    def at(self, w: np.ndarray, lam: np.ndarray) -> Inputs[P, H]:
        """Return the inputs at (w, λ)."""
        params = self.backend.from_flat(w, self.inputs.params)
        return self.inputs._replace(params=params, hparams=self.backend.from_flat(lam, self.inputs.hparams))

    def inner(self, w: np.ndarray, lam: np.ndarray) -> tuple[float, np.ndarray]:
        """Return L and ∂L/∂w. For an equation, ‖r‖² and r."""
        value, grad = self._evaluate(_inner, w, lam)
        away = w - self.w
        damped = grad - self.offset + self.damping * away
        if not self.minimizes:
            return float(damped @ damped), damped
        return float(value) + float((0.5 * self.damping * away - self.offset) @ away), damped

    def outer(self, w: np.ndarray, lam: np.ndarray) -> float:
        """Return F."""
        return float(self._evaluate(_outer, w, lam)[0])

    def hessian(self, w: np.ndarray, lam: np.ndarray) -> np.ndarray:
        """Return ∂²L/∂w², or ∂r/∂w, of shape (n, n), from n products with its transpose."""
        return self._evaluate(_hessian, w, lam)[0].T + self.damping * np.eye(w.size)

    def derivatives(self, w: np.ndarray, lam: np.ndarray, u: np.ndarray) -> dict[str, np.ndarray]:
        """Return the backend's derivatives at (w, λ), including products with u, of shape (n,)."""
        return dict(zip(DERIVATIVES, self._evaluate(_derivatives, w, lam, self._flat(u, 0)), strict=True))

    def _flat(self, x: np.ndarray, i: int) -> Array:
        """Return an array like the entries of params (i = 0) or hparams (i = 1)."""
        like = self.backend.to_numpy(self.backend.space(self.inputs[i]).ravel(self.inputs[i]))
        return self.backend.from_numpy(x.astype(like.dtype))

    def _evaluate(
        self, function: Callable[..., Sequence[Array]], w: np.ndarray, lam: np.ndarray, *more: Array
    ) -> list[np.ndarray]:
        """Call a function of inputs with flat trees, so that the conversion to trees is compiled too."""
        flat = (self._flat(w, 0), self._flat(lam, 1))
        with np.errstate(all="ignore"):  # a trial step may be too long
            found = self.backend.run(_at, function, self.problem, flat, self.inputs, more)
        return [np.asarray(self.backend.to_numpy(array), dtype=np.float64) for array in found]

    def _check_follows_arguments(self) -> None:
        u = np.random.default_rng(0).standard_normal(self.w.size)
        given = self.backend.run(_derivatives, self.problem, self.inputs, self._flat(u, 0))
        copied, eps = self.derivatives(self.w, self.lam, u), precision(self.problem, self.eps)
        for array, (name, copy) in zip(given, copied.items(), strict=True):
            array = np.asarray(self.backend.to_numpy(array), dtype=np.float64)
            if np.abs(array - copy).max(initial=0.0) > 10 * eps**0.5 * np.abs(array).max(initial=0.0):
                raise ValueError(
                    f"{name} changes when params and hparams are replaced by copies, so the inner problem cannot be "
                    "solved again at other hyperparameters. The objectives must compute with their arguments (in "
                    "PyTorch by torch.func.functional_call), not with a module's own parameters or other captured "
                    "arrays, and without dropout."
                )


def _at(
    backend: Backend,
    function: Callable[..., Sequence[Array]],
    problem: BilevelProblem,
    flat: tuple[Array, Array],
    inputs: Inputs[P, H],
    more: tuple[Array, ...],
) -> Sequence[Array]:
    params, hparams = backend.space(inputs.params), backend.space(inputs.hparams)
    inputs = inputs._replace(params=params.unravel(flat[0]), hparams=hparams.unravel(flat[1]))
    return function(backend, problem, inputs, *more)


def _inner(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array, Array]:
    space = backend.space(inputs.params)
    value, grad = problem.value_and_residual(backend, inputs.params, inputs.hparams, inputs.inner_args)
    return space.dot(grad, grad) if value is None else value, space.ravel(grad)


def _outer(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array]:
    return (backend.outer(problem.outer, inputs.params, inputs.hparams, inputs.outer_args).value,)


def _hessian(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array]:
    at = problem.linearize(backend, inputs.params, inputs.hparams, inputs.inner_args)
    return (backend.space(inputs.params).materialise(at.vjp_params),)


def _derivatives(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], u: Array) -> list[Array]:
    """Return the derivatives in the order of DERIVATIVES."""
    found = derivatives(backend, problem, inputs, backend.space(inputs.params).unravel(u))
    return [backend.space(tree).ravel(tree) for tree in found]

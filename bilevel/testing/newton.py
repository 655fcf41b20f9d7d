"""Solve the inner problem to rounding, and follow its minimizer as λ moves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import linalg, optimize

from bilevel.errors import SolverError
from bilevel.testing.dense_reference import factorize
from bilevel.testing.host import HostProblem

Factor = Callable[[np.ndarray], np.ndarray]  # b -> H⁻¹ b
SAME = 1e-3  # a stationary point within this relative distance of params is accepted, even if it is no minimum


class Minimizer(NamedTuple):
    """w*, of shape (n,), with a factorized Hessian at w* or a nearby point."""

    w: np.ndarray
    factor: Factor


class _Hessian:
    """The dense inner Hessian: by products if differences of ∂L/∂w agree with them, else by such differences.

    So the inner problem can be solved with a wrong ``hvp``, and its solution shows that the ``hvp`` is wrong.
    """

    def __init__(self, host: HostProblem[Any, Any]) -> None:
        self.host = host
        self.trusted: bool | None = None

    def __call__(self, w: np.ndarray, lam: np.ndarray) -> np.ndarray:
        if self.trusted is not False:
            hessian = self.host.hessian(w, lam)
            if self.trusted is None:
                d = np.random.default_rng(0).standard_normal(w.size)
                expected = self.column(w, lam, d / np.linalg.norm(d)) * np.linalg.norm(d)
                self.trusted = bool(np.linalg.norm(hessian @ d - expected) <= 0.05 * np.linalg.norm(expected))
            if self.trusted:
                return hessian
        hessian = np.stack([self.column(w, lam, e) for e in np.eye(w.size)], axis=1)
        return (hessian + hessian.T) / 2 if self.host.minimizes else hessian

    def column(self, w: np.ndarray, lam: np.ndarray, d: np.ndarray) -> np.ndarray:
        h = self.host.eps ** (1 / 3) * (np.linalg.norm(w) / w.size**0.5 or 1.0)
        return (self.host.inner(w + h * d, lam)[1] - self.host.inner(w - h * d, lam)[1]) / (2 * h)


class InnerSolver:
    """Minimize L( · , λ), or solve r( · , λ) = 0, from the caller's params, and follow the solution as λ changes.

    ``minimizer`` is the solution at the caller's λ.

    Raises:
        SolverError: if no isolated minimizer is found.
    """

    def __init__(self, host: HostProblem[Any, Any]) -> None:
        self.host, self.hessian = host, _Hessian(host)
        self.minimizer = self._minimize()

    @property
    def w(self) -> np.ndarray:
        """The solution at the caller's λ, of shape (n,)."""
        return self.minimizer.w

    def follow(self, lam: np.ndarray) -> np.ndarray:
        """Return the minimizer at a nearby λ, of shape (n,), from the minimizer at the caller's λ.

        Raises:
            SolverError: if Newton's method does not converge.
        """
        return self._newton(*self.minimizer, lam, refreshes=3).w

    @np.errstate(all="ignore")  # divergence is detected by its results
    def _minimize(self) -> Minimizer:
        w, lam, host = self.host.w, self.host.lam, self.host
        try:
            found = self._newton(w, None, lam, refreshes=20)
            if (
                not host.minimizes
                or np.linalg.norm(found.w - w) <= SAME * np.linalg.norm(w)
                or self._is_minimum(found.w)
            ):
                return found
        except SolverError:
            pass  # Newton's method converges only near a solution

        if host.minimizes:
            method, options = "L-BFGS-B", {"maxiter": 5_000, "maxfun": 20_000, "ftol": 0.0, "gtol": 0.0}
            w = optimize.minimize(host.inner, w, args=(lam,), jac=True, method=method, options=options).x
        else:
            method = "SciPy's hybr"
            w = optimize.root(lambda w: host.inner(w, lam)[1], w, jac=lambda w: self.hessian(w, lam)).x
        try:
            found = self._newton(w, None, lam, refreshes=20)
        except SolverError as error:
            raise SolverError(
                f"the inner problem could not be solved from params by {method} and Newton's method: {error}"
            ) from error
        if host.minimizes and not self._is_minimum(found.w):
            raise SolverError(
                "the inner problem could not be solved from params: the stationary point found is no minimum "
                "(its Hessian is not positive definite). Start from params that minimize the inner objective."
            )
        return found

    def _is_minimum(self, w: np.ndarray) -> bool:
        try:
            linalg.cholesky(self.hessian(w, self.host.lam))
        except (linalg.LinAlgError, ValueError):
            return False
        return True

    @np.errstate(all="ignore")
    def _newton(self, w: np.ndarray, factor: Factor | None, lam: np.ndarray, refreshes: int) -> Minimizer:
        """Iterate w ← w − H⁻¹ ∂L/∂w until rounding stops it. Keep H while each step is at most half the last."""
        eps = self.host.eps
        last, reach = np.inf, 0.0
        while True:
            if factor is None:
                if refreshes == 0:
                    raise SolverError(f"its steps do not shrink (the last was {last:.2g}).")
                factor = factorize(self.hessian(w, lam), eps)
                refreshes, last = refreshes - 1, np.inf
            value, grad = self.host.inner(w, lam)
            step = factor(grad)
            size, reach = float(np.linalg.norm(step)), max(reach, float(np.linalg.norm(w)))
            if not np.isfinite(size):
                raise SolverError("the inner objective or its gradient is nan or infinite.")
            if size >= 0.5 * last:
                # The step is small, or L cannot decrease by more than its rounding error.
                if size <= eps**0.5 * reach or abs(grad @ step) <= eps * abs(value):
                    return Minimizer(w, factor)
                factor = None
                continue
            w, last = w - step, size

"""The laws of optional derivatives of a backend: fixed points and Gauss-Newton products."""

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from bilevel.backend import Backend
from bilevel.hypergradient import hypergradient
from bilevel.linear_solvers import Exact
from bilevel.problems.model_loss import ModelLoss
from bilevel.problems.optimality import FixedPoint
from bilevel.spaces.array import Array
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.framework import Framework
from bilevel.testing.conformance.problems import QUADRATIC, quadratic_point
from bilevel.testing.conformance.systems import SIZE, normal


@dataclass(frozen=True)
class _Step:
    """w ← M w + B λ."""

    def __call__(self, w: Array, h: Array, M: Array, B: Array) -> Array:
        return M @ w + B @ h

    def vjp_params(self, w: Array, h: Array, v: Array, M: Array, B: Array) -> Array:
        return M.T @ v

    def vjp_hparams(self, w: Array, h: Array, v: Array, M: Array, B: Array) -> Array:
        return B.T @ v


def fixed_point(f: Framework) -> None:
    """The hypergradient of a linear fixed point equals the closed form, by the transposed Jacobian."""
    q = quadratic_point(f.backend, f.dtype)
    M = 0.2 * normal(9, SIZE, SIZE)
    arguments = {**q.arguments, "inner_args": (f.array(M), q.arguments["inner_args"][1])}
    hg = hypergradient(FixedPoint(_Step(), QUADRATIC.outer), **arguments, solver=Exact(), backend=f.backend)
    v = linalg.solve(np.eye(SIZE) - M.astype(f.dtype).astype(np.float64).T, q.rhs)
    f.close("fixed point: hg.adjoint", f.host(hg.adjoint), v)
    f.close("fixed point: hg.grad", f.host(hg.grad), q.direct + q.coupling.T @ v)


def gauss_newton(f: Framework) -> None:
    """Gauss-Newton products of a linear model equal Hessian-vector products, with the penalty."""
    X, y, w, lam, v = normal(0, 8, SIZE), normal(1, 8), normal(2, SIZE), normal(3, SIZE) ** 2, normal(4, SIZE)
    inner = ModelLoss(
        model=lambda w, h, x: x @ w,
        loss=lambda output, y: (output - y) @ (output - y) / 2,
        penalty=lambda w, h: (h * w * w).sum() / 2,
    )
    found = f.backend.gauss_newton(inner, f.array(w), f.array(lam), (f.array(X), f.array(y)))
    f.close("Gauss-Newton: residual", f.host(found.residual), X.T @ (X @ w - y) + lam * w)
    f.close("Gauss-Newton: vjp_params(v)", f.host(found.vjp_params(f.array(v))), X.T @ (X @ v) + lam * v)
    f.close("Gauss-Newton: vjp_hparams(v)", f.host(found.vjp_hparams(f.array(v))), w * v)


LAWS: list[Law] = [fixed_point, gauss_newton]
PER_DTYPE: list[Law] = []


def derived_by(backend: Backend) -> list[Law]:
    """Return the laws of the methods that the backend overrides."""
    found, laws = type(backend), []
    if found.jacobian is not Backend.jacobian:
        laws.append(fixed_point)
    return [*laws, gauss_newton] if found.gauss_newton is not Backend.gauss_newton else laws

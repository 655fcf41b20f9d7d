"""The laws of methods that compute a hypergradient from a problem."""

import sys
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.hypergradient import hypergradient
from bilevel.problems.problem import Problem
from bilevel.results import Hypergradient, Status
from bilevel.testing.conformance.checks import Law, require
from bilevel.testing.conformance.execution import late_backends
from bilevel.testing.conformance.judge import ROUNDING, relative_error
from bilevel.testing.conformance.problems import (
    CURVED,
    NO_CROSS_TERM,
    NO_DIRECT_TERM,
    QUADRATIC,
    TREES,
    QuadraticPoint,
    quadratic_point,
)
from bilevel.testing.conformance.subject import Subject, dtype_of, nest
from bilevel.testing.conformance.systems import SIZE, normal

INDEFINITE = np.array([-2.0, -1.0, 1.0, 2.0, 3.0, 4.0])


def definite(s: Subject) -> None:
    """At the minimum of a quadratic problem, dF/dλ and v equal the closed form, if solves= has "definite"."""
    point = quadratic_point(s.backend, s.dtype)
    hg = _run(s, QUADRATIC, point.arguments)
    _judge(s, point, hg, "the minimum of a quadratic problem")


def from_afar(s: Subject) -> None:
    """Away from the minimum, F and dF/dλ are the values at `hg.params`, the end of the method."""
    point = quadratic_point(s.backend, s.dtype, at_minimum=False)
    hg = _run(s, QUADRATIC, point.arguments)
    _judge(s, point, hg, "a quadratic problem away from its minimum")


def curved(s: Subject) -> None:
    """On a problem that is not quadratic, dF/dλ uses the curvature at `hg.params`, if solves= has "definite"."""
    lam, t = 0.5 * normal(1, SIZE), normal(2, SIZE)
    arrays = {"params": s.array(np.full(SIZE, 0.5)), "hparams": s.array(lam), "outer_args": (s.array(t),)}
    hg = _run(s, CURVED, arrays)
    w, grad = s.backend.to_flat(hg.params), s.backend.to_flat(hg.grad)
    v = (1 + lam) * (w - t) / (1 + lam**2 + 3 * w**2)
    closed = (w - t) ** 2 / 2 - 2 * lam * w * v
    right = relative_error(grad, closed) <= 4 * s.tolerance() or not s.promises("definite")
    require(right, f"a problem with fourth powers, by {s}", f"dF/dλ = {closed}", grad)


def indefinite(s: Subject) -> None:
    """If the Hessian is indefinite and the status is CONVERGED, dF/dλ equals the closed form."""
    point = quadratic_point(s.backend, s.dtype, eigenvalues=INDEFINITE)
    hg = _run(s, QUADRATIC, point.arguments)
    _judge(s, point, hg, "the saddle point of an indefinite quadratic", promised="indefinite")


def one_unknown(s: Subject) -> None:
    """A problem with one weight is solved."""
    point = quadratic_point(s.backend, s.dtype, eigenvalues=np.array([3.0]))
    _judge(s, point, _run(s, QUADRATIC, point.arguments), "a quadratic problem with one weight")


def without_direct_term(s: Subject) -> None:
    """If F does not depend on λ, dF/dλ has only the indirect term."""
    point = quadratic_point(s.backend, s.dtype)._replace(direct=np.zeros(3))
    _judge(s, point, _run(s, NO_DIRECT_TERM, point.arguments), "a quadratic problem whose F has no λ")


def without_cross_term(s: Subject) -> None:
    """If ∂L/∂w does not depend on λ, dF/dλ = ∂F/∂λ."""
    point = quadratic_point(s.backend, s.dtype, at_minimum=False)
    grad = s.backend.to_flat(_run(s, NO_CROSS_TERM, point.arguments).grad)
    where = f"a quadratic problem without a mixed derivative, by {s}"
    require(np.array_equal(grad, point.direct), where, f"dF/dλ = ∂F/∂λ = {point.direct}", grad)


def nested_tree(s: Subject) -> None:
    """Trees keep their structure, shapes and dtypes, also empty leaves, and contain the closed form."""
    flat = [normal(1, SIZE), normal(1, SIZE), normal(2, SIZE), np.linspace(1.0, 4.0, SIZE)]  # w = λ: the minimum
    params, lam, target, curvature = (nest(s.array(a)) for a in flat)
    arguments = {"params": params, "hparams": lam, "inner_args": (curvature,), "outer_args": (target,)}
    hg = _run(s, TREES, arguments)
    where, wanted = f"a quadratic problem of trees, by {s}", _shapes(s, lam)
    for name, tree in (("grad", hg.grad), ("adjoint", hg.adjoint), ("params", hg.params)):
        require(_shapes(s, tree) == wanted, where, f"hg.{name} with the leaves {wanted}", _shapes(s, tree))
    if s.promises("definite"):
        grad, w, t = (s.backend.to_flat(tree) for tree in (hg.grad, hg.params, target))
        require(relative_error(grad, w - t) <= 4 * s.tolerance(), where, f"dF/dλ = {w - t}", grad)


def nan_hessian(s: Subject) -> None:
    """A nan in the Hessian gives NON_FINITE and a dF/dλ that is not finite, so that the failure shows under jit."""
    point = quadratic_point(s.backend, s.dtype)
    hessian = point.hessian.copy()
    hessian[1, 1] = np.nan
    hg = _run(s, QUADRATIC, point.arguments, inner_args=(s.array(hessian), *point.arguments["inner_args"][1:]))
    grad = s.backend.to_flat(hg.grad)
    loud = hg.info.status == Status.NON_FINITE and not np.isfinite(grad).all()
    got = f"{hg.info.status.name} and {grad}"
    require(loud, f"a Hessian with a nan, by {s}", "NON_FINITE and a dF/dλ that is not finite", got)


def deterministic(s: Subject) -> None:
    """A second call with the same problem gives the same bits."""
    point = quadratic_point(s.backend, s.dtype)
    first, second = (s.backend.to_flat(_run(s, QUADRATIC, point.arguments)[:4]) for _ in range(2))
    require(np.array_equal(first, second), f"a quadratic problem, by {s}", f"the same bits as before, {first}", second)


def inputs_untouched(s: Subject) -> None:
    """Params, hparams and data are not written to."""
    point = quadratic_point(s.backend, s.dtype)
    before = [a.tobytes() for a in map(s.backend.to_numpy, _arrays(point))]
    _run(s, QUADRATIC, point.arguments)
    after = [a.tobytes() for a in map(s.backend.to_numpy, _arrays(point))]
    names = ["params", "hparams", "H", "B", "c", "t", "d"]
    written = [name for name, a, b in zip(names, before, after, strict=True) if a != b]
    require(not written, f"a quadratic problem, by {s}", "no array to change", f"a change in {', '.join(written)}")


def overrun(s: Subject) -> None:
    """Steps that a loop takes after its flag is false change no bit of the result."""
    point = quadratic_point(s.backend, s.dtype)
    for backend, copies in late_backends(s.backend):
        plain, *late = (
            s.backend.to_flat(_run(s, QUADRATIC, point.arguments, backend=each)[:4]) for each in (backend, *copies)
        )
        for found in late:
            require(np.array_equal(found, plain), f"a quadratic problem, by {s}", f"in any case {plain}", found)


def under_jit_and_vmap(s: Subject) -> None:
    """A batch of problems under the caller's `jax.jit` and `jax.vmap` gives the same results as each problem alone."""
    jax, points = sys.modules["jax"], [quadratic_point(s.backend, s.dtype, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(
        lambda *parts: s.backend.space(parts[0]).leaf_xp.stack(parts), *(point.arguments for point in points)
    )
    hgs = jax.jit(jax.vmap(lambda arguments: _run(s, QUADRATIC, arguments)))(stacked)
    for i, point in enumerate(points):
        alone, hg = _run(s, QUADRATIC, point.arguments), jax.tree.map(lambda leaf, i=i: leaf[i], hgs)
        grad, expected = s.backend.to_flat(hg.grad), s.backend.to_flat(alone.grad)
        close = relative_error(grad, expected) <= s.tolerance() and int(hg.info.status) == alone.info.status
        require(close, f"a quadratic problem, by {s}", f"the result without vmap, {expected}", grad)


def laws_on(backend: Backend) -> list[Law]:
    """Return the laws of a framework's loops."""
    return [under_jit_and_vmap] if backend.name == "jax" else [overrun]


PER_DTYPE: list[Law] = [definite, from_afar]
LAWS: list[Law] = [
    curved,
    indefinite,
    one_unknown,
    without_direct_term,
    without_cross_term,
    nested_tree,
    nan_hessian,
    deterministic,
    inputs_untouched,
]
ALL: list[Law] = [*LAWS, overrun, under_jit_and_vmap]


def _run(s: Subject, problem: Problem, arguments: dict[str, Any], **changed: Any) -> Hypergradient:
    options = {"backend": s.backend, **arguments, **changed}
    return hypergradient(problem, **options, solver=s.solver, on_failure="ignore")


def _judge(s: Subject, point: QuadraticPoint, hg: Hypergradient, what: str, promised: str = "definite") -> None:
    """Raise an AssertionError unless all fields are true at hg.params and, if promised, equal the closed form."""
    backend, where, info = s.backend, f"{what}, by {s}", hg.info
    eps = backend.space(point.arguments["params"]).eps
    for name, leaf in (("grad", hg.grad), ("value", hg.value), ("adjoint", hg.adjoint), ("params", hg.params)):
        require(dtype_of(leaf) == s.dtype, where, f"hg.{name} in {s.dtype}", leaf.dtype)
    grad, adjoint, w = (backend.to_flat(tree) for tree in (hg.grad, hg.adjoint, hg.params))
    value, expected = float(backend.to_host(hg.value)), point.value_at(w)
    got = f"{info.status.name} after {info.steps} steps, dF/dλ = {grad}"
    scale = abs(expected) + np.sum((w - point.target) ** 2)
    right = abs(value - expected) <= ROUNDING * eps * scale or not np.isfinite(scale)
    require(right, where, f"hg.value = F(hg.params, λ) = {expected:.7g}", f"{value:.7g}")
    claims = info.status == Status.CONVERGED and not s.truncated
    if not (s.promises(promised) or claims):
        return
    require(info.status == Status.CONVERGED, where, "CONVERGED (a promise of check_solver's solves=)", got)
    require(np.isfinite(info.residual_norm) or s.truncated, where, "a finite info.residual_norm", info)
    v = point.adjoint_at(w)
    closed = point.direct + point.coupling.T @ v
    error, allowed = np.linalg.norm(grad - closed), 4 * s.tolerance() * (np.linalg.norm(closed) + np.linalg.norm(v))
    require(error <= allowed, where, f"dF/dλ = {closed} to {allowed:.2g} in norm", got)
    require(relative_error(adjoint, v) <= 4 * s.tolerance(), where, f"hg.adjoint = {v}", adjoint)


def _shapes(s: Subject, tree: object) -> list[tuple[str, tuple[int, ...], str]]:
    return [(path, tuple(leaf.shape), dtype_of(leaf)) for path, leaf in s.backend.leaves(tree)]


def _arrays(point: QuadraticPoint) -> list[Any]:
    a = point.arguments
    return [a["params"], a["hparams"], *a["inner_args"], *a["outer_args"]]

"""The laws of a backend's derivatives: closed forms, finite differences, and errors for missing dependence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.diagnosis.agreement import compare
from bilevel.hypergradient import hypergradient
from bilevel.linear_solvers import CG, GMRES, MINRES, BiCGStab, Exact, LinearSolver, Neumann, Nystrom
from bilevel.linearization import Inputs, LinearizedMap, OuterDerivatives
from bilevel.methods import Method, Unrolled
from bilevel.problems.problem import Problem
from bilevel.results import Status
from bilevel.spaces.array import Array, H, P
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.framework import Framework
from bilevel.testing.conformance.problems import (
    CURVED,
    NO_CROSS_TERM,
    NO_DIRECT_TERM,
    QUADRATIC,
    TREES,
    quadratic_point,
)
from bilevel.testing.conformance.systems import SIZE, normal

SHARP = 1e-12  # solve to the precision of the dtype
SOLVERS: dict[str, LinearSolver[Any] | Method] = {
    "cg": CG(rtol=SHARP, damping=0.0),
    "minres": MINRES(rtol=SHARP),
    "gmres": GMRES(rtol=SHARP),
    "bicgstab": BiCGStab(rtol=SHARP),
    "nystrom": Nystrom(),
    "neumann": Neumann(terms=200),
    "exact": Exact(),
    "unrolled": Unrolled(steps=200),
}
DRIFT = 1000  # times eps: the tolerance of a whole hypergradient


def closed_form(f: Framework) -> None:
    """The derivatives of a quadratic problem equal the closed form, also away from its minimum."""
    q = quadratic_point(f.backend, f.dtype, at_minimum=False)
    v, u = normal(7, SIZE).astype(f.dtype).astype(np.float64), normal(8, q.hparams.size).astype(f.dtype)
    inputs = Inputs(*q.arguments.values())
    got = f.backend.run(_derive, QUADRATIC, inputs, f.array(v), f.array(u))
    expected = {
        "value": np.asarray(q.value),
        "grad_params": q.rhs,
        "grad_hparams": q.direct,
        "residual": q.hessian @ q.params - q.coupling @ q.hparams - q.offset,
        "vjp_params(v)": q.hessian @ v,
        "vjp_hparams(v)": -(q.coupling.T @ v),
        "vjp(v)[0]": q.hessian @ v,
        "vjp(v)[1]": -(q.coupling.T @ v),
        "jvp_hparams(u)": -(q.coupling @ u.astype(np.float64)),
    }
    for name, array in got.items():
        f.close(f"quadratic problem: {name}", f.host(array), expected[name])
        f.equal(f"dtype of {name}", f.shapes(array)[0][2], f.dtype)


def differences(f: Framework) -> None:
    """Each derivative agrees with finite differences, on a problem that is not quadratic."""
    problem, inputs = f.problem, f.inputs
    if problem is None or inputs is None:
        shapes = [f.tree(normal(seed, SIZE)) for seed in range(3)]
        problem, inputs = CURVED, Inputs(shapes[0], shapes[1], (), (shapes[2],))
    found = compare(f.backend, problem, inputs)
    f.require(found.of, "derivatives that differences can be taken for", found.names, found.obstacle)
    for agreement in found.of:
        f.require(not agreement.wrong, "derivatives", "the derivatives of the objectives", agreement.sentence())


def isolated(f: Framework) -> None:
    """The function that `Backend.isolated` yields returns moved inputs and does not change the inputs."""
    (w, w_), (h, h_), (v, v_), (u, u_) = (f.draw(seed) for seed in range(4))
    inputs = Inputs(w_, h_, (f.array(np.ones(2)),))
    for double in (False, True):
        with f.backend.isolated(inputs, double) as at:
            moved = at(v_, u_)
            f.equal("params and hparams, moved", f.flat([moved.params, moved.hparams]), np.append(v, u))
    f.equal("params and hparams, afterwards", f.flat([w_, h_]), np.append(w, h))


def products_are_linear_and_repeat(f: Framework) -> None:
    """Products are linear in their vector, and repeated products with a vector are equal."""
    q = quadratic_point(f.backend, f.dtype)
    (x, x_), (y, y_) = ((a, f.array(a)) for a in (normal(7, SIZE), normal(8, SIZE)))
    first, mixed, again, zero = f.backend.run(_products, QUADRATIC, Inputs(*q.arguments.values()), x_, y_)
    f.close("vjp_params(2x - y)", f.host(mixed), q.hessian @ (2 * x - y))
    f.equal("vjp_params(x), taken again", f.host(again), f.host(first))
    f.equal("vjp_params(0)", f.host(zero), np.zeros(SIZE))


def nested_trees(f: Framework) -> None:
    """Derivatives have the structure, shapes and dtypes of their variables, also for empty and scalar leaves."""
    w, h, k, t, v = (f.draw(seed) for seed in range(5))
    inputs = Inputs(w[1], h[1], (k[1],), (t[1],))
    grad, grad_params, hvp, cross = f.backend.run(_derive_trees, TREES, inputs, v[1])
    for name, tree, expected in (
        ("residual", grad, k[0] * (w[0] - h[0])),
        ("grad_params", grad_params, w[0] - t[0]),
        ("vjp_params(v)", hvp, k[0] * v[0]),
        ("vjp_hparams(v)", cross, -k[0] * v[0]),
    ):
        f.keeps(f"trees: {name}", tree, w[1])
        f.close(f"trees: {name}", f.flat(tree), expected)


def none_without_direct_term(f: Framework) -> None:
    """grad_hparams is None, not zeros, if F does not depend on λ, so that a λ without influence is detected."""
    q = quadratic_point(f.backend, f.dtype)
    outer, _ = _at(f.backend, NO_DIRECT_TERM, Inputs(*q.arguments.values()))
    f.require(outer.grad_hparams is None, "grad_hparams", None, outer.grad_hparams)


def none_without_cross_term(f: Framework) -> None:
    """vjp_hparams(v) is None if ∂L/∂w does not depend on λ, even if L does."""
    q = quadratic_point(f.backend, f.dtype)
    _, at = _at(f.backend, NO_CROSS_TERM, Inputs(*q.arguments.values()))
    product = at.vjp_hparams(q.arguments["params"])
    f.require(product is None, "vjp_hparams(v)", None, product)


def hparams_without_influence(f: Framework) -> None:
    """If neither F nor ∂L/∂w depends on hparams, bl.hypergradient raises a ValueError that names hparams."""
    q = quadratic_point(f.backend, f.dtype)
    problem = Problem(NO_CROSS_TERM.inner, NO_DIRECT_TERM.outer)
    _refused(f, "depends on hparams", lambda: hypergradient(problem, **q.arguments, backend=f.backend))


def inner_cut_off(f: Framework) -> None:
    """For an inner objective that does not depend on params, the backend raises a ValueError that names params."""
    q = quadratic_point(f.backend, f.dtype)
    problem = Problem(_Constant(), QUADRATIC.outer)
    _refused(f, "params", lambda: _at(f.backend, problem, Inputs(*q.arguments.values())))


def outer_cut_off(f: Framework) -> None:
    """For an outer objective without params and hparams, the backend raises a ValueError that names them."""
    q = quadratic_point(f.backend, f.dtype)
    problem = Problem(QUADRATIC.inner, _Constant())
    _refused(f, "params", lambda: _at(f.backend, problem, Inputs(*q.arguments.values())))


def outer_not_scalar(f: Framework) -> None:
    """For an outer objective that returns no scalar, the backend raises a ValueError that names it."""
    q = quadratic_point(f.backend, f.dtype)
    problem = Problem(QUADRATIC.inner, _PerEntry())
    _refused(f, "outer", lambda: _at(f.backend, problem, Inputs(*q.arguments.values())))


def inputs_untouched(f: Framework) -> None:
    """Params, hparams and data are not written to, and a second call gives the same bits."""
    q = quadratic_point(f.backend, f.dtype)
    arrays = [q.arguments["params"], q.arguments["hparams"], *q.arguments["inner_args"], *q.arguments["outer_args"]]
    before = [f.host(a).copy() for a in arrays]
    first, second = (f.host(hypergradient(QUADRATIC, **q.arguments, backend=f.backend).grad) for _ in range(2))
    f.equal("dF/dλ, taken again", second, first)
    for name, array, old in zip(("params", "hparams", "H", "B", "c", "t", "d"), arrays, before, strict=True):
        f.equal(f"{name} after bl.hypergradient", f.host(array), old)


def _law_of_a_hypergradient(name: str) -> Law:
    def law(f: Framework) -> None:
        solver = SOLVERS[name]
        q = quadratic_point(f.backend, f.dtype, damping=solver.fixed_damping)
        hg = hypergradient(QUADRATIC, **q.arguments, solver=solver, backend=f.backend, on_failure="ignore")
        f.equal(f"status by {solver}", hg.info.status, Status.CONVERGED)
        for field, expected in (("grad", q.grad), ("adjoint", q.adjoint), ("value", q.value)):
            f.close(f"hg.{field} by {solver}", f.host(hg._asdict()[field]), expected, DRIFT)
        f.equal("dtype of hg.grad", f.shapes(hg.grad)[0][2], f.dtype)

    law.__name__ = f"hypergradient_{name}"
    law.__doc__ = f"A whole bl.hypergradient, solved by {name}, equals the closed form."
    return law


HYPERGRADIENTS = [_law_of_a_hypergradient(name) for name in SOLVERS]
PER_DTYPE: list[Law] = [closed_form, differences, nested_trees]
LAWS: list[Law] = [
    isolated,
    products_are_linear_and_repeat,
    none_without_direct_term,
    none_without_cross_term,
    hparams_without_influence,
    inner_cut_off,
    outer_cut_off,
    outer_not_scalar,
    inputs_untouched,
    *HYPERGRADIENTS,
]


def _at(backend: Backend, problem: Problem, inputs: Inputs[P, H]) -> tuple[OuterDerivatives[P, H], LinearizedMap[P, H]]:
    params, hparams, inner_args, outer_args = inputs
    outer = backend.outer(problem.outer, params, hparams, outer_args)
    return outer, problem.linearize(backend, params, hparams, inner_args)


def _derive(backend: Backend, problem: Problem, inputs: Inputs[P, H], v: P, u: H) -> dict[str, Any]:
    outer, at = _at(backend, problem, inputs)
    derived = dict(zip(("value", "grad_params", "grad_hparams"), outer, strict=False))
    derived |= {"residual": at.residual, "vjp_params(v)": at.vjp_params(v), "vjp_hparams(v)": at.vjp_hparams(v)}
    derived |= zip(("vjp(v)[0]", "vjp(v)[1]"), at.vjp(v), strict=True)
    return derived if at.jvp_hparams is None else {**derived, "jvp_hparams(u)": at.jvp_hparams(u)}


def _products(backend: Backend, problem: Problem, inputs: Inputs[P, H], x: P, y: P) -> list[P]:
    space, hvp = backend.space(x), _at(backend, problem, inputs)[1].vjp_params
    return [hvp(x), hvp(space.subtract(space.scale(2.0, x), y)), hvp(x), hvp(space.zeros())]


def _derive_trees(backend: Backend, problem: Problem, inputs: Inputs[P, H], v: P) -> list[Any]:
    outer, at = _at(backend, problem, inputs)
    return [at.residual, outer.grad_params, at.vjp_params(v), at.vjp_hparams(v)]


def _refused(f: Framework, name: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError as error:
        f.require(name in str(error), "the error", f"a sentence with {name!r}", error)
    else:
        f.require(False, "the raised error", "a ValueError", "no error")


@dataclass(frozen=True)
class _Constant:
    """An objective that reads neither params nor hparams."""

    def __call__(self, w: Array, h: Array, *args: Array) -> Array:
        return args[0].sum()

    def grad(self, w: Array, h: Array, *args: Array) -> Any:
        return 0 * w if len(args) == 3 else (0 * w, None)

    def hvp(self, w: Array, h: Array, v: Array, *args: Array) -> Array:
        return 0 * v

    def cross_vjp(self, w: Array, h: Array, v: Array, *args: Array) -> None:
        return None


@dataclass(frozen=True)
class _PerEntry:
    """½ (w − t)², entry by entry."""

    def __call__(self, w: Array, h: Array, t: Array, d: Array) -> Array:
        return 0.5 * (w - t) * (w - t)

    def grad(self, w: Array, h: Array, t: Array, d: Array) -> tuple[Array, None]:
        return w - t, None

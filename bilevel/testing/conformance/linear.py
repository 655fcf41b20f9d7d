"""The laws of all linear solvers."""

import numpy as np

from bilevel.hypergradient import hypergradient
from bilevel.results import Status
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.judge import ROUNDING, expect, judge, relative_error, same
from bilevel.testing.conformance.problems import QUADRATIC, quadratic_point
from bilevel.testing.conformance.subject import Answer, Subject, nest
from bilevel.testing.conformance.systems import System


def definite(s: Subject) -> None:
    """Well-conditioned positive definite systems are solved, in agreement with SciPy, if solves= has "definite"."""
    _judge_class(s, "definite")


def ill_conditioned(s: Subject) -> None:
    """Ill-conditioned definite systems are solved if solves= has their class; CONVERGED is never false."""
    _judge_class(s, "ill_conditioned")


def indefinite(s: Subject) -> None:
    """Indefinite systems are solved if solves= has their class; CONVERGED is never false."""
    _judge_class(s, "indefinite")


def singular(s: Subject) -> None:
    """Singular systems with solutions are solved if solves= has their class; CONVERGED is never false."""
    _judge_class(s, "singular")


def inconsistent(s: Subject) -> None:
    """For a singular system without a solution, the status is not CONVERGED, and v stays finite."""
    system = systems.inconsistent()
    answer = s.solve(system)
    judge(s, system, answer)
    if not s.truncated:
        expect(answer.info.status != Status.CONVERGED, s, system, "any status but CONVERGED", answer)


def one_unknown(s: Subject) -> None:
    """A single equation is solved, with a positive or a negative coefficient."""
    for factor, kind in ((3.0, "definite"), (-3.0, "indefinite")):
        system = systems.one_unknown(factor)
        judge(s, system, s.solve(system), promised=s.promises(kind))


def multiples_of_identity(s: Subject) -> None:
    """2 I v = b has the solution b/2, and -2 I v = b the solution -b/2."""
    for factor, kind in ((2.0, "definite"), (-2.0, "indefinite")):
        system = systems.multiple(factor)
        judge(s, system, s.solve(system), promised=s.promises(kind))


def zero_rhs(s: Subject) -> None:
    """For b = 0, v = 0 with CONVERGED, for any warm start."""
    system = systems.definite()._replace(what="a definite system with b = 0", rhs=np.zeros(systems.SIZE))
    for x0 in (None, np.ones(systems.SIZE)):
        answer = s.solve(system, x0)
        right = not answer.x.any() and answer.info.status == Status.CONVERGED
        expect(right, s, system, f"v = 0 and CONVERGED with adjoint0 = {x0}", answer)


def non_finite_rhs(s: Subject) -> None:
    """A nan or an infinity in b gives NON_FINITE and a v that is not finite, so that the failure shows under jit."""
    for bad in (np.nan, np.inf):
        system = systems.definite()
        system = system._replace(what=f"a definite system with b[1] = {bad}", rhs=np.where(np.arange(6) == 1, bad, 1.0))
        _require_non_finite(s, system, s.solve(system))


def non_finite_operator(s: Subject) -> None:
    """An operator with an infinite entry gives NON_FINITE and a v that is not finite."""
    system = systems.definite()
    sound = s.solve(system)
    matrix = system.matrix.copy()
    matrix[1, 1] = np.inf
    system = system._replace(what="an operator with an infinite entry", matrix=matrix)
    _require_non_finite(s, system, s.solve(system), sound)


def nan_product(s: Subject) -> None:
    """A first or later product that is nan gives NON_FINITE and a v that is not finite."""
    system = systems.chain()
    sound = s.solve(system)
    for k in (0, 2):
        what = f"{system.what} whose products are nan from number {k} on (counted from 0)"
        _require_non_finite(s, system._replace(what=what), s.solve(system, trap=k), sound)


def extreme_scales(s: Subject) -> None:
    """Scaling b by 1e-30 or 1e30 in float32 scales v and info.rhs_norm, and keeps the status."""
    system = systems.definite()
    plain = s.solve(system)
    for exponent in (-100, -60, 60, 100):
        scaled = system._replace(what=f"{system.what}, b times 2^{exponent}", rhs=np.ldexp(system.rhs, exponent))
        answer = s.solve(scaled)
        close = relative_error(np.ldexp(answer.x, -exponent), plain.x) <= s.tolerance() * system.condition
        size = np.ldexp(plain.info.rhs_norm, exponent)
        right = close and abs(answer.info.rhs_norm - size) <= 1e-5 * size and answer.info.status == plain.info.status
        expected = f"{plain.info.status.name}, v = 2^{exponent} * {plain.x} and rhs_norm {size:.4g}"
        expect(right, s, scaled, expected, answer)


def drift(s: Subject) -> None:
    """After many steps in float32, where recurrences lose accuracy, the status and the residual are true."""
    s = s.with_options(maxiter=max(1000, s.solver.maxiter)) if s.has_option("maxiter") else s
    judge(s, systems.long(), s.solve(systems.long()))


def nested_tree(s: Subject) -> None:
    """A tree gives the same result as the flat vector of its entries, also with scalar and empty leaves."""
    system = systems.definite()
    flat, answer = s.solve(system), s.solve(system, shape=nest)
    leaves = [(path, tuple(leaf.shape), s.dtype) for path, leaf in s.backend.leaves(nest(s.array(system.rhs)))]
    expect(answer.leaves == leaves, s, system, f"the leaves {leaves}", answer.leaves)
    close = relative_error(answer.x, flat.x) <= s.tolerance() * system.condition
    expect(close, s, system, f"in a tree the result of a flat vector ({flat})", answer)
    judge(s, system, answer, promised=s.promises("definite"))


def deterministic(s: Subject) -> None:
    """A second solve of a system gives the same bits."""
    for system in (systems.definite(), systems.indefinite()):
        first, second = s.solve(system), s.solve(system)
        expect(same(first, second), s, system, f"the same bits as before ({first})", second)


def inputs_untouched(s: Subject) -> None:
    """b and the warm start are not written to."""
    system = systems.definite()
    _, rhs = s.rounded(system)
    arrays = []

    def keep(array):
        arrays.append(array)
        return array

    s.solve(system, rhs, shape=keep)
    for name, array in zip(("b", "adjoint0"), arrays, strict=True):
        after = np.asarray(s.backend.to_numpy(array), np.float64)
        expect(np.array_equal(after, rhs), s, system, f"{name} to stay {rhs}", after)


def in_a_hypergradient(s: Subject) -> None:
    """`bl.hypergradient` with the solver gives the closed form of a quadratic problem."""
    point = quadratic_point(s.backend, s.dtype, damping=s.damping)
    hg = hypergradient(QUADRATIC, **point.arguments, solver=s.solver, backend=s.backend, on_failure="ignore")
    answer = s.answer(hg.adjoint, hg.info)
    system = System("the quadratic problem", point.hessian, point.rhs, 4.0)
    if s.promises("definite"):
        error = relative_error(answer.x, point.adjoint)
        expect(error <= 4 * s.tolerance(), s, system, f"the adjoint {point.adjoint}", answer)
    grad = np.asarray(s.backend.to_numpy(hg.grad), np.float64)
    combined = point.direct + point.coupling.T @ answer.x
    allowed = ROUNDING * s.backend.space(hg.grad).eps * np.linalg.norm(combined)
    expect(np.linalg.norm(grad - combined) <= allowed, s, system, f"dF/dλ = {combined}", grad)


PER_DTYPE: list[Law] = [definite, ill_conditioned, indefinite, singular, inconsistent, multiples_of_identity]
LAWS: list[Law] = [
    one_unknown,
    zero_rhs,
    non_finite_rhs,
    non_finite_operator,
    nan_product,
    extreme_scales,
    drift,
    nested_tree,
    deterministic,
    inputs_untouched,
    in_a_hypergradient,
]
IN_FLOAT32: list[Law] = [extreme_scales, drift]


def _require_non_finite(s: Subject, system: System, answer: Answer, sound: Answer | None = None) -> None:
    """Require NON_FINITE. A solver that never used a non-finite number may give the answer of the sound system."""
    if sound is None or not same(answer, sound):
        right = answer.info.status == Status.NON_FINITE and not np.isfinite(answer.x).all()
        expect(right, s, system, "NON_FINITE and a v that is not finite", answer)


def _judge_class(s: Subject, kind: str) -> None:
    system = systems.CLASSES[kind]()
    judge(s, system, s.solve(system), promised=s.promises(kind, system.condition))

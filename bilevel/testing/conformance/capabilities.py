"""The laws of features that only some linear solvers have: options, warm starts, other operators and dtypes."""

import numpy as np

from bilevel.hypergradient import hypergradient
from bilevel.linear_solvers import STEADY, SYMMETRIC
from bilevel.operators.linear_operator import LinearOperator
from bilevel.prepare import prepare
from bilevel.results import Status
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.judge import ROUNDING, expect, judge, relative_error
from bilevel.testing.conformance.problems import QUADRATIC, quadratic_point
from bilevel.testing.conformance.subject import Kind, Subject
from bilevel.testing.conformance.systems import System


def nonsymmetric(s: Subject) -> None:
    """Systems that are not symmetric are solved if solves= has their class; CONVERGED is never false."""
    system, known = systems.nonsymmetric(), SYMMETRIC not in s.solver.requires
    told = "an attribute requires without SYMMETRIC, by which bilevel knows the operators that the solver accepts"
    expect(known or "nonsymmetric" not in s.solves, s, system, told, s.solver.requires)
    answer = s.solve(system, kind=Kind(symmetric=not known))
    judge(s, system, answer, promised=s.promises("nonsymmetric", system.condition))


def stochastic(s: Subject) -> None:
    """An operator with equal samples gives the same result as the operator without samples."""
    system = systems.definite()
    one, many = s.solve(system), s.solve(system, kind=Kind(sampled=True))
    judge(s, system, many)
    close = relative_error(many.x, one.x) <= s.tolerance()
    expect(close and many.info.status == one.info.status, s, system, f"from equal samples the result {one}", many)


def prepared(s: Subject) -> None:
    """The result of `bl.prepare` gives the same adjoint as the solver."""
    point = quadratic_point(s.backend, s.dtype, damping=s.damping)
    arguments = {**point.arguments, "backend": s.backend}
    ready = prepare(s.solver, QUADRATIC, **{k: v for k, v in arguments.items() if k != "outer_args"})
    found, alone = (
        s.backend.to_flat(hypergradient(QUADRATIC, **arguments, solver=solver, on_failure="ignore").adjoint)
        for solver in (ready, s.solver)
    )
    system = System("the quadratic problem", point.hessian, point.rhs, 4.0)
    close = relative_error(found, alone) <= s.tolerance()
    expect(close, s, system, f"from {ready!r} the adjoint of the solver, {alone}", found)


def warm_start_stays(s: Subject) -> None:
    """A solve that starts at the solution stays there, if the solver uses warm starts."""
    system = systems.definite()
    exact = np.linalg.solve(*s.rounded(system))
    answer = s.solve(system, exact)
    judge(s, system, answer)
    stays = s.truncated or answer.info.status == Status.CONVERGED
    expect(stays, s, system, f"CONVERGED at once from the solution {exact}", answer)
    allowed = ROUNDING * s.eps * system.condition
    what = f"the solution {exact}, which is the start, to a relative {allowed:.1g}"
    expect(relative_error(answer.x, exact) <= allowed, s, system, what, answer)


def warm_start_used(s: Subject) -> None:
    """A start near the solution takes fewer steps than a start at zero, or leaves less residual."""
    system = systems.ill_conditioned()
    matrix, rhs = s.rounded(system)
    near = np.linalg.solve(matrix, rhs) * (1 + 1e-9 * systems.normal(3, systems.SIZE))
    cold, warm = s.solve(system), s.solve(system, near)
    judge(s, system, warm)
    left = [np.linalg.norm(rhs - matrix @ answer.x) for answer in (cold, warm)]
    better = warm.info.steps < cold.info.steps or left[1] <= 0.1 * left[0]
    expect(better, s, system, f"fewer steps, or a tenth of the residual, than from zero ({cold})", warm)


def warm_start_ignored(s: Subject) -> None:
    """A warm start changes nothing, because check_solver got warm_start=False."""
    system = systems.definite()
    cold, warm = s.solve(system), s.solve(system, systems.normal(3, systems.SIZE))
    close = relative_error(warm.x, cold.x) <= s.tolerance()
    expect(close, s, system, f"the result of a cold start ({cold})", warm)


def maxiter(s: Subject) -> None:
    """A solve takes at most maxiter steps, also for 0, and reports MAXITER if they are too few."""
    system, start = systems.ill_conditioned(), systems.normal(3, systems.SIZE)
    for most, x0 in ((0, start), (3, None)):
        limited = s.with_options(maxiter=most)
        answer = limited.solve(system, x0)
        judge(limited, system, answer)
        if most == 0:
            stays = s.rounded(system._replace(rhs=start))[1] if s.warm_start else np.zeros_like(start)
            none = answer.info.steps == 0 and answer.info.status == Status.MAXITER and (answer.x == stays).all()
            expect(none, limited, system, f"MAXITER after 0 steps and v = {stays}", answer)
        expect(answer.info.steps <= most, limited, system, f"at most {most} steps", answer)


def damping(s: Subject) -> None:
    """With the option damping, the solution and the residual belong to (A + damping I) v = b."""
    damped = s.with_options(damping=s.damping + 0.5)
    system = systems.definite()
    judge(damped, system, damped.solve(system), promised=s.promises("definite"))


def bfloat16(s: Subject) -> None:
    """In bfloat16, v stays bfloat16 and is accurate to a few per cent, and the status is true."""
    s = s.with_dtype("bfloat16")
    if s.has_option("rtol"):
        s = s.with_options(rtol=max(0.05, s.solver.rtol))
    for system in (systems.multiple(2.0), systems.definite()):
        answer = s.solve(system)
        judge(s, system, answer)
        if "definite" in s.solves and system.condition == 1:
            error = relative_error(answer.x, system.rhs / 2)
            expect(error <= max(0.1, s.rtol or 0.0), s, system, f"v = {system.rhs / 2} to 10 %", answer)


def laws_of(s: Subject) -> list[Law]:
    """Return the laws that apply to a solver on a backend."""
    applies = {
        nonsymmetric: True,
        warm_start_stays: s.warm_start,
        warm_start_used: s.warm_start,
        warm_start_ignored: not s.warm_start,
        maxiter: s.has_option("maxiter"),
        damping: s.has_option("damping"),
        bfloat16: hasattr(s.backend.space(s.array(1.0)).leaf_xp, "bfloat16"),
        stochastic: STEADY not in s.solver.requires,
        prepared: _has_state(s),
    }
    return [law for law, does in applies.items() if does]


def _has_state(s: Subject) -> bool:
    """Tell whether there is something to prepare."""
    space = s.backend.space(s.array(np.ones(2)))
    return s.solver.init(LinearOperator(space, lambda v: v)) is not None


ALL: list[Law] = [
    nonsymmetric,
    warm_start_stays,
    warm_start_used,
    warm_start_ignored,
    maxiter,
    damping,
    bfloat16,
    stochastic,
    prepared,
]

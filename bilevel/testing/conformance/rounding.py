"""The laws of solvers under rounding errors: 40 unknowns in float32, and systems that are singular to rounding."""

import numpy as np

from bilevel.linear_solvers import SYMMETRIC
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.judge import expect, judge
from bilevel.testing.conformance.subject import Kind, Subject

NOISE = 10  # times norm(b) / (eps norm(A)): for a longer v, A v is only rounding error


def many_unknowns(s: Subject) -> None:
    """With 40 unknowns in float32, systems are solved if solves= has their class; CONVERGED is never false."""
    for kind, make in systems.CLASSES.items():
        system, known = make(systems.MANY), kind == "nonsymmetric" and SYMMETRIC not in s.solver.requires
        answer = s.solve(system, kind=Kind(symmetric=not known))
        judge(s, system, answer, promised=s.promises(kind, system.condition))


def runaway(s: Subject) -> None:
    """On singular systems without a solution, the norm of v stays below 10 norm(b) / (eps norm(A))."""
    for seed in range(12):
        system = systems.inconsistent(systems.MANY, seed)
        answer = s.solve(system)
        matrix, rhs = s.rounded(system)
        allowed = NOISE * np.linalg.norm(rhs) / (s.eps * np.linalg.norm(matrix, 2))
        expect(np.linalg.norm(answer.x) <= allowed, s, system, f"norm(v) <= {allowed:.2g}", answer)


def nearly_singular(s: Subject) -> None:
    """On nearly singular systems that are not symmetric, in float32, the status and the residual are true."""
    for seed in range(30):
        system = systems.nearly_singular(seed)
        judge(s, system, s.solve(system, kind=Kind(symmetric=False)))


def laws_on(s: Subject) -> list[Law]:
    """Return the laws that apply to a solver on a backend. JAX has none, because it would compile for each shape."""
    if s.backend.name == "jax":
        return []
    return ALL if SYMMETRIC not in s.solver.requires else [many_unknowns, runaway]


ALL: list[Law] = [many_unknowns, runaway, nearly_singular]

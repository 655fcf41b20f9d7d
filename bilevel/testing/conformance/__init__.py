"""Public conformance suites of solvers and backends."""

from bilevel.testing.conformance.backend_suite import check_backend
from bilevel.testing.conformance.checks import Check
from bilevel.testing.conformance.solver_suite import check_solver

__all__ = ["Check", "check_backend", "check_solver"]

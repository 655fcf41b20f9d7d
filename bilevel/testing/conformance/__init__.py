"""Public conformance suites: what a solver or a backend of one's own must hold."""

from bilevel.testing.conformance.backend_suite import check_backend
from bilevel.testing.conformance.checks import Check
from bilevel.testing.conformance.solver_suite import check_solver

__all__ = ["Check", "check_backend", "check_solver"]

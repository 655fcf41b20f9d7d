"""Check hypergradients, solvers and backends in your own tests.

`check_hypergradient` compares a hypergradient with one of two references and raises an ``AssertionError`` with a table.
`check_solver` and `check_backend` return conformance checks for your solvers and backends. For hypothesis strategies of
problems with known answers, use ``from bilevel.testing import strategies``.
"""

from bilevel.testing.check import check_hypergradient
from bilevel.testing.conformance import check_backend, check_solver
from bilevel.testing.dense_reference import exact_hypergradient
from bilevel.testing.difference_reference import finite_difference_hypergradient

__all__ = [
    "check_backend",
    "check_hypergradient",
    "check_solver",
    "exact_hypergradient",
    "finite_difference_hypergradient",
]

"""Verify hypergradients, in your own tests.

`check_hypergradient` compares with one of two references and raises an ``AssertionError`` with a table. The
hypothesis strategies, problems with known answers, are imported explicitly: ``from bilevel.testing import
strategies``. For solvers and backends of your own, `check_solver` and `check_backend` return the laws that they
must hold, as checks to be called.
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

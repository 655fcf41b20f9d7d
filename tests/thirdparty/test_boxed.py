"""What the third party runs, in one line for each."""

import bilevel_boxed
import pytest

from bilevel.testing import check_backend, check_solver

ANALYTIC = "objectives bring their own gradients"


@pytest.mark.parametrize(
    "check",
    check_backend("boxed", excused={"inner_cut_off": ANALYTIC, "outer_cut_off": ANALYTIC}),
    ids=str,
)
def test_backend(check):
    check()


@pytest.mark.parametrize("check", check_solver(bilevel_boxed.Chebyshev(1.0, 4.0)), ids=str)
def test_solver(check):
    check()

"""Under `jax_numpy_dtype_promotion="strict"`, where operands of different dtypes are errors, the laws hold as well.

JAX_NUMPY_DTYPE_PROMOTION=strict in the environment runs the whole suite in that mode.
"""

import pytest
from frameworks import failures

jax = pytest.importorskip("jax")

import bilevel as bl  # noqa: E402
from bilevel.testing import check_backend, check_solver  # noqa: E402

SOLVERS = [
    bl.CG(),
    bl.CG(preconditioner=bl.NystromPreconditioner(rank=3)),
    bl.MINRES(),
    bl.GMRES(),
    bl.BiCGStab(),
    bl.Nystrom(),
    bl.Exact(),
    bl.Neumann(),
    bl.Identity(),
    bl.Unrolled(steps=20),
    bl.Unrolled(steps=20, mode="forward"),
]
LAWS = ["definite-jax-float32", "in_a_hypergradient-jax"]
MIXED = ("dot_of_half_precision-jax", "mixed_precision-jax")  # laws whose own functions mix dtypes


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_solvers_never_mix_dtypes():
    checks = [
        check
        for solver in SOLVERS
        for check in check_solver(solver, solves=[], truncated=True, backends="jax")
        if check.name in LAWS
    ]
    assert len(checks) >= 2 * len(SOLVERS) - 2
    assert not failures(checks)


def test_the_backend_never_mixes_dtypes():
    assert not failures(check for check in check_backend("jax") if check.name not in MIXED)

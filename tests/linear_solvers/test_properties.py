"""Drawn trees, matrices and dtypes: every solver on every backend, against SciPy."""

import numpy as np
import pytest
from frameworks import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status
from bilevel.operators.linear_operator import LinearOperator
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.testing import strategies

# JAX compiles for each structure that is drawn.
few = settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])


def rtol_of(dtype):
    return 1e-9 if dtype == np.float64 else 1e-4


def solvers(dtype):
    rtol = rtol_of(dtype)
    return [bl.CG(rtol=rtol, maxiter=500), bl.MINRES(rtol=rtol, maxiter=500), bl.Neumann(terms=1500), bl.Exact()]


def solve_tree(backend, solver, matrix, rhs):
    space = backend.space(rhs)
    A = LinearOperator(space, lambda v: space.unravel(matrix @ space.ravel(v)))
    return solver.solve(solver.init(A), A, rhs, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@few
@given(data=st.data())
def test_every_solver_matches_scipy_on_every_tree(backend, dtype, data):
    rhs = data.draw(strategies.trees(dtype=dtype))
    flat = np.concatenate([leaf.ravel() for _, leaf in leaves_with_paths(rhs)])
    matrix = data.draw(strategies.symmetric_matrices(flat.size, 30.0)).astype(dtype)
    exact = linalg.solve(matrix.astype(np.float64), flat)
    condition = np.linalg.cond(matrix.astype(np.float64))
    system = backend.from_numpy(matrix), tree_map(backend.from_numpy, rhs)
    for solver in solvers(dtype):
        x, info = backend.run(solve_tree, solver, *system)
        assert [(p, leaf.shape) for p, leaf in backend.leaves(x)] == [(p, a.shape) for p, a in leaves_with_paths(rhs)]
        assert {backend.to_numpy(leaf).dtype for _, leaf in backend.leaves(x)} == {np.dtype(dtype)}
        assert int(backend.to_host(info.status)) == Status.CONVERGED
        # A residual below rtol norm(b) leaves an error below κ rtol norm(x).
        error = relative_error(backend.to_flat(x), exact)
        assert error <= condition * 2 * rtol_of(dtype), solver

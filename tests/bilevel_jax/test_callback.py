"""Functions of NumPy in compiled functions of JAX keep 64 bits, whatever thread runs them."""

import numpy as np
import pytest

import bilevel as bl

jax = pytest.importorskip("jax")
jnp = jax.numpy
from bilevel.spaces.jax_callback import jax_callback  # noqa: E402

try:
    from jax import enable_x64
except ImportError:  # JAX 0.7
    from jax.experimental import enable_x64


@pytest.fixture
def _only_here_64_bits():
    """Leave 64 bits off for other threads, as they are for users by default."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    with enable_x64(True):
        yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("_only_here_64_bits")
class TestInAnotherThread:
    def test_arguments_and_results_keep_their_bits(self):
        seen = set()

        def host(x, i):
            seen.add((x.dtype.name, i.dtype.name))
            return x + i

        @jax.jit
        def run(x):  # large, so that JAX runs it in another thread
            x = jnp.cumsum(x) / 3
            return x, jax_callback(host, x, x, jnp.asarray(2**40 + 1))

        for k in range(6):
            x, found = run(jnp.ones(200_000) + k)
            assert found.dtype == jnp.float64
            assert np.array_equal(found, np.asarray(x) + (2**40 + 1))
        assert seen == {("float64", "int64")}

    def test_an_exact_solve(self):
        n = 300
        hessian, h = jnp.diag(jnp.linspace(1, 3, n)), jnp.ones(n)
        problem = bl.Problem(lambda w, h, A: 0.5 * w @ A @ w - w @ h, lambda w, h: ((w - 1) ** 2).sum())
        w = h / jnp.diag(hessian)
        for _ in range(4):
            grad = bl.hypergradient(problem, w, h, inner_args=(hessian,), solver="exact").grad
            assert np.allclose(grad, 2 * (w - 1) / jnp.diag(hessian), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float64, np.bool_])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_every_shape_and_row(shape, dtype):
    x = jnp.asarray((np.arange(np.prod(shape, dtype=int)).reshape(shape) % 2).astype(dtype))
    same = jax.jit(lambda x: jax_callback(lambda x: x.copy(), x, x))
    assert np.array_equal(same(x), x)
    assert same(x).dtype == x.dtype
    if shape:
        assert np.array_equal(jax.vmap(same)(x), x)

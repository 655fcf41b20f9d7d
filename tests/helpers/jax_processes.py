"""Checks of arrays that are sharded over processes: `python jax_processes.py RANK PORT`."""

import os
import sys

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import numpy as np
from compiled_text import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevel as bl
import bilevel_jax

PROCESSES = 2
ROWS, ALL = P("d"), P()
SOLVER = bl.CG(rtol=1e-12, maxiter=40)


def inner(w, h, X, y):
    losses = h["weight"] * (jnp.tanh(X @ w["first"]) @ w["last"] - y) ** 2
    return jnp.mean(losses) + jnp.sum(jnp.exp(h["decay"]) * w["first"] ** 2) + jnp.sum(w["last"] ** 2)


def outer(w, h, X, y):
    return jnp.mean((jnp.tanh(X @ w["first"]) @ w["last"] - y) ** 2)


def hypergradient(w, h, train, val):
    hg = bl.hypergradient(bl.Problem(inner, outer), w, h, inner_args=train, outer_args=val, solver=SOLVER)
    return hg.grad, hg.adjoint, hg.value


def point():
    """Return params, hyperparameters, training data and validation data as NumPy arrays."""
    rng = np.random.default_rng(0)
    w = {"first": 0.1 * rng.normal(size=(8, 6)), "last": 0.1 * rng.normal(size=6)}
    h = {"decay": rng.normal(size=(8, 6)), "weight": rng.uniform(0.5, 1.5, 12)}
    return w, h, (rng.normal(size=(12, 8)), rng.normal(size=12)), (rng.normal(size=(12, 8)), rng.normal(size=12))


def place(mesh, tree, specs):
    """Return global arrays. Each process gives its part of them."""
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
    return jax.tree.map(
        lambda a, spec: jax.make_array_from_callback(a.shape, NamedSharding(mesh, spec), lambda i: a[i]), tree, specs
    )


def agree(found, expected):
    """Compare the parts of this process."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        for part in a.addressable_shards:
            np.testing.assert_allclose(part.data, np.asarray(b)[part.index], rtol=1e-10, atol=1e-12)


def alike(found, given):
    """Check that arrays are sharded as others are."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)


def main(mesh):
    at = point()
    expected = jax.jit(hypergradient)(*at)  # on a device of this process
    rows = {"decay": ALL, "weight": ROWS}
    columns = P(None, "d")
    layouts = {
        "rows of the data": (ALL, rows, ROWS, ROWS),
        "columns of the data": (
            {"first": ROWS, "last": ALL},
            {"decay": ROWS, "weight": ALL},
            (columns, ALL),
            (columns, ALL),
        ),
    }
    for name, specs in layouts.items():
        placed = [place(mesh, *pair) for pair in zip(at, specs, strict=True)]
        compiled = jax.jit(hypergradient).lower(*placed).compile()
        grad, adjoint, value = compiled(*placed)
        agree((grad, adjoint, value), expected)
        alike((grad, adjoint), (placed[1], placed[0]))
        found = collectives(compiled.as_text())
        assert set(found) == {"all-reduce"}, (name, found)  # no process receives the params of another
    placed = [place(mesh, *pair) for pair in zip(at, layouts["rows of the data"], strict=True)]
    solve = bilevel_jax.implicit_minimizer(lambda w, h, start, *data: inner(w, h, *data), solver=SOLVER)(
        lambda h, start, X, y: start
    )

    def loss(h, w, train, val):
        return outer(solve(h, w, *train), h, *val)

    agree(jax.jit(jax.grad(loss))(placed[1], placed[0], *placed[2:]), expected[0])


if __name__ == "__main__":
    rank, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", PROCESSES, rank)
    assert jax.process_count() == PROCESSES
    assert jax.device_count() == PROCESSES * len(jax.local_devices())
    main(jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,)))
    jax.distributed.shutdown()

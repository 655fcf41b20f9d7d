"""A decay for each weight of a softmax regression, tuned on several processes with a part of the data each.

    python examples/jax/processes.py                                               # one process
    python examples/jax/processes.py --address localhost:1234 --processes 2 --rank 0 &
    python examples/jax/processes.py --address localhost:1234 --processes 2 --rank 1

All processes receive the same hypergradient, as if one process had all data.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevel as bl
from bilevel.demo.data import load

INNER_STEPS = 50
SOLVER = bl.CG(damping=0.01, maxiter=20, rtol=1e-3)


def loss(params, x, y):
    """Return the mean loss of all examples, no matter which process has them."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"] + params["bias"], y).mean()


def inner(params, log_decay, x, y):
    """Return the training loss with a penalty."""
    return loss(params, x, y) + jnp.sum(jnp.exp(log_decay) * params["kernel"] ** 2)


def outer(params, log_decay, x, y):
    """Return the validation loss."""
    return loss(params, x, y)


problem = bl.Problem(inner, outer)
inner_optimizer, outer_optimizer = optax.sgd(0.5, momentum=0.9), optax.adam(0.3)


@jax.jit
def outer_step(state, train, validation):
    """Return the state after some inner steps and a step of the decays, and the validation loss."""
    params, log_decay, moments, adjoint = state

    def step(carry, _):
        params, moments = carry
        updates, moments = inner_optimizer.update(jax.grad(inner)(params, log_decay, *train), moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, inner_optimizer.init(params)), length=INNER_STEPS)
    hg = bl.hypergradient(
        problem, params, log_decay, inner_args=train, outer_args=validation, solver=SOLVER, adjoint0=adjoint
    )
    updates, moments = outer_optimizer.update(hg.grad, moments)
    return (params, optax.apply_updates(log_decay, updates), moments, hg.adjoint), hg.value


def main(argv=None):
    """Tune the decays. The first process prints the validation losses; return the last one."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--address", help="host and port of the first process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="outer steps")
    options = parser.parse_args(argv)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.address, options.processes, options.rank)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def of_all(part):
        """Return global arrays from the rows of this process: all processes have equally many."""
        count = len(part.y) // jax.device_count() * jax.device_count()
        mine = slice(options.rank, count, options.processes)
        return tuple(jax.make_array_from_process_local_data(rows, a[mine]) for a in (part.X.astype(np.float32), part.y))

    digits = load(0)
    train, validation = of_all(digits.train), of_all(digits.validation)
    params = jax.device_put({"kernel": np.zeros((64, 10), "f"), "bias": np.zeros(10, "f")}, everywhere)
    log_decay = jax.device_put(np.full((64, 10), -6.0, "f"), everywhere)
    value = None
    state = params, log_decay, jax.jit(outer_optimizer.init)(log_decay), params
    for step in range(options.steps):
        state, value = outer_step(state, train, validation)
        if options.rank == 0:
            print(f"step {step + 1}: validation loss {value:.4f}")
    if options.processes > 1:
        jax.distributed.shutdown()
    return value


if __name__ == "__main__":
    main()

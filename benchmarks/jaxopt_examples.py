"""JAXopt's examples of implicit differentiation, by JAXopt and by bilevel: values, times and lines side by side.

The examples come from the gallery of JAXopt 0.8.5. They are ridge regression, the Lasso, sparse coding, the dual of a
multiclass SVM, dataset distillation, a deep equilibrium model, non-negative matrix factorization and MAML by implicit
derivatives. Here, they have random data. Both sides solve the
inner problem by the same solver of JAXopt, and only the derivative differs. The script first checks that the values
agree. Run it in .venv-peers, perhaps with the names of some examples:

    OMP_NUM_THREADS=1 python -m benchmarks.jaxopt_examples equilibrium maml
"""
# pyright: reportMissingImports=false

import inspect
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
from jaxopt import projection, prox

import bilevel as bl
import bilevel_jax

ROUNDS = 100
PLAIN = {"implicit_diff": False, "unroll": False}  # a loop that stops at the tolerance, without a derivative


class Example(NamedTuple):
    """Two outer objectives of hyperparameters, whose gradients are compared."""

    hparams: Any
    theirs: Callable[[Any], jax.Array]
    ours: Callable[[Any], jax.Array]


def normal(seed: int, *shape: int) -> jax.Array:
    """Return random data."""
    return jax.random.normal(jax.random.key(seed), shape)


def ridge() -> Example:
    """Tune a penalty of ridge regression: 200 examples, 30 weights."""
    X, y, X_val, y_val = normal(0, 200, 30), normal(1, 200), normal(2, 200, 30), normal(3, 200)

    def inner(w: jax.Array, log_penalty: jax.Array) -> jax.Array:
        return jnp.mean((X @ w - y) ** 2) + jnp.exp(log_penalty) * jnp.sum(w**2)

    def outer(w: jax.Array) -> jax.Array:
        return jnp.mean((X_val @ w - y_val) ** 2)

    def theirs(h: jax.Array) -> jax.Array:
        return outer(jaxopt.LBFGS(inner, maxiter=100, tol=1e-5).run(jnp.zeros(30), h).params)

    @bilevel_jax.implicit_minimizer(inner)
    def train(h: jax.Array) -> jax.Array:
        return jaxopt.LBFGS(inner, maxiter=100, tol=1e-5, **PLAIN).run(jnp.zeros(30), h).params

    return Example(jnp.asarray(-2.0), theirs, lambda h: outer(train(h)))


def lasso() -> Example:
    """Tune the penalty of a Lasso: 100 examples, 50 weights."""
    X, X_val = normal(0, 100, 50), normal(1, 100, 50)
    y, y_val = (A[:, :5].sum(1) + 0.1 * normal(i, 100) for i, A in ((2, X), (3, X_val)))

    def smooth(w: jax.Array, _: Any = None) -> jax.Array:
        return jnp.mean((X @ w - y) ** 2) / 2

    def outer(w: jax.Array) -> jax.Array:
        return jnp.mean((X_val @ w - y_val) ** 2)

    solver = partial(jaxopt.ProximalGradient, smooth, prox.prox_lasso, maxiter=1000, tol=1e-6)

    def theirs(h: jax.Array) -> jax.Array:
        return outer(solver().run(jnp.zeros(50), jnp.exp(h)).params)

    @bilevel_jax.implicit_minimizer(smooth, prox=bl.prox.l1())
    def train(h: jax.Array) -> jax.Array:
        return solver(**PLAIN).run(jnp.zeros(50), jnp.exp(h)).params

    return Example(jnp.asarray(-2.0), theirs, lambda h: outer(train(h)))


def sparse_coding() -> Example:
    """Learn a dictionary of 20 atoms for 50 signals of 10 entries. The codes are the inner problem."""
    signals, atoms = normal(0, 50, 10), normal(1, 20, 10)

    def smooth(codes: jax.Array, atoms: jax.Array) -> jax.Array:
        return jnp.sum((codes @ atoms - signals) ** 2) / 2

    def proximal(codes: jax.Array, penalty: float, scaling: Any = 1.0) -> jax.Array:
        return prox.prox_lasso(codes, penalty, scaling)

    solver = partial(jaxopt.ProximalGradient, smooth, proximal, maxiter=2000, tol=1e-4)

    def theirs(atoms: jax.Array) -> jax.Array:
        return smooth(solver().run(jnp.zeros((50, 20)), 2.0, atoms).params, atoms)

    @bilevel_jax.implicit_minimizer(smooth, prox=bl.prox.l1(2.0))
    def train(atoms: jax.Array) -> jax.Array:
        return solver(**PLAIN).run(jnp.zeros((50, 20)), 2.0, atoms).params

    return Example(atoms, theirs, lambda atoms: smooth(train(atoms), atoms))


def svm_dual() -> Example:
    """Tune the regularization of a multiclass SVM, by its dual: 60 examples, 5 features, 3 classes."""
    X, X_val = normal(0, 60, 5), normal(1, 60, 5)
    labels, labels_val = (jax.nn.one_hot(jnp.argmax(A[:, :3], 1), 3) for A in (X, X_val))

    def weights(dual: jax.Array, h: jax.Array) -> jax.Array:
        return X.T @ (labels - dual) / jnp.exp(h)

    def inner(dual: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.exp(h) / 2 * jnp.sum(weights(dual, h) ** 2) + jnp.vdot(dual, labels)

    def project(dual: jax.Array, _: Any = None) -> jax.Array:
        return jax.vmap(projection.projection_simplex)(dual)

    def outer(dual: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.mean((X_val @ weights(dual, h) - labels_val) ** 2)

    solver = partial(jaxopt.ProjectedGradient, inner, project, maxiter=2000, tol=1e-5)
    start = jnp.full((60, 3), 1 / 3)

    def theirs(h: jax.Array) -> jax.Array:
        return outer(solver().run(start, None, h).params, h)

    @bilevel_jax.implicit_minimizer(inner, prox=bl.projections.simplex())
    def train(h: jax.Array) -> jax.Array:
        return solver(**PLAIN).run(start, None, h).params

    return Example(jnp.asarray(2.0), theirs, lambda h: outer(train(h), h))


def distillation() -> Example:
    """Learn ten examples of 64 pixels for a softmax regression."""
    X, labels, own = normal(0, 300, 64), jnp.arange(300) % 10, jnp.arange(10)

    def loss(w: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.log_softmax(images @ w)[jnp.arange(len(labels)), labels])

    def inner(w: jax.Array, images: jax.Array) -> jax.Array:
        return loss(w, images, own) + 0.05 * jnp.sum(w**2)

    def theirs(images: jax.Array) -> jax.Array:
        solver = jaxopt.GradientDescent(inner, maxiter=300, tol=1e-5)
        return loss(solver.run(jnp.zeros((64, 10)), images).params, X, labels)

    @bilevel_jax.implicit_minimizer(inner)
    def train(images: jax.Array) -> jax.Array:
        solver = jaxopt.GradientDescent(inner, maxiter=300, tol=1e-5, **PLAIN)
        return solver.run(jnp.zeros((64, 10)), images).params

    return Example(normal(1, 10, 64), theirs, lambda images: loss(train(images), X, labels))


def equilibrium() -> Example:
    """Differentiate a deep equilibrium layer of 64 units for a batch of 32."""
    x, weights = normal(0, 32, 64), 0.05 * normal(1, 64, 64)

    def layer(z: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.tanh(z @ weights + x)

    solver = partial(jaxopt.AndersonAcceleration, layer, maxiter=50, tol=1e-5)

    def theirs(weights: jax.Array) -> jax.Array:
        return jnp.sum(solver().run(jnp.zeros((32, 64)), weights).params ** 2)

    @bilevel_jax.implicit_fixed_point(layer, bl.Neumann(step_size=1.0, terms=20))  # the layer contracts
    def train(weights: jax.Array) -> jax.Array:
        return solver(**PLAIN).run(jnp.zeros((32, 64)), weights).params

    return Example(weights, theirs, lambda weights: jnp.sum(train(weights) ** 2))


def factorization() -> Example:
    """Learn 5 non-negative parts for 60 signals of 20 entries. The non-negative codes are the inner problem."""
    signals, parts = jnp.abs(normal(0, 60, 20)), jnp.abs(normal(1, 5, 20))

    def inner(codes: jax.Array, parts: jax.Array) -> jax.Array:
        return jnp.sum((codes @ parts - signals) ** 2) / 2

    def outer(codes: jax.Array, parts: jax.Array) -> jax.Array:
        return inner(codes, parts) + jnp.sum(codes)  # the codes also count

    def project(codes: jax.Array, _: Any = None) -> jax.Array:
        return jnp.maximum(codes, 0)

    solver = partial(jaxopt.ProjectedGradient, inner, project, maxiter=1000, tol=1e-4)

    def theirs(parts: jax.Array) -> jax.Array:
        return outer(solver().run(jnp.ones((60, 5)), None, parts).params, parts)

    @bilevel_jax.implicit_minimizer(inner, prox=bl.projections.nonnegative())
    def train(parts: jax.Array) -> jax.Array:
        return solver(**PLAIN).run(jnp.ones((60, 5)), None, parts).params

    return Example(parts, theirs, lambda parts: outer(train(parts), parts))


def maml() -> Example:
    """Learn initial weights of an MLP 1-20-1 for 8 tasks of sines, each with a proximal training (iMAML)."""
    phases = jnp.linspace(0, 3, 8)
    x, x_val = 2 * normal(0, 8, 10, 1), 2 * normal(1, 8, 10, 1)
    meta = {"in": normal(2, 1, 20), "bias": normal(3, 20), "out": 0.3 * normal(4, 20, 1)}

    def loss(w: dict[str, jax.Array], x: jax.Array, phase: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"] - jnp.sin(x + phase)) ** 2)

    def inner(w: dict[str, jax.Array], meta: dict[str, jax.Array], x: jax.Array, phase: jax.Array) -> jax.Array:
        away = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), w, meta)
        return loss(w, x, phase) + sum(jax.tree.leaves(away))

    solver = partial(jaxopt.GradientDescent, inner, stepsize=0.02, maxiter=500, tol=1e-5, acceleration=False)

    def theirs(meta: dict[str, jax.Array]) -> jax.Array:
        adapted = lambda x, phase: solver().run(meta, meta, x, phase).params  # noqa: E731
        return jnp.mean(jax.vmap(loss)(jax.vmap(adapted)(x, phases), x_val, phases))

    @bilevel_jax.implicit_minimizer(inner, bl.CG(damping=0.0))  # vmap would run the automatic damping for each task
    def train(meta: dict[str, jax.Array], x: jax.Array, phase: jax.Array) -> dict[str, jax.Array]:
        return solver(**PLAIN).run(meta, meta, x, phase).params

    def ours(meta: dict[str, jax.Array]) -> jax.Array:
        adapted = jax.vmap(train, (None, 0, 0))(meta, x, phases)
        return jnp.mean(jax.vmap(loss)(adapted, x_val, phases))

    return Example(meta, theirs, ours)


EXAMPLES = (ridge, lasso, sparse_coding, svm_dual, distillation, equilibrium, factorization, maml)


def measure(example: Example) -> None:
    """Check that the gradients agree. Print the time of compilation, and the median CPU time of a gradient in ms."""
    grads = [jax.jit(jax.grad(f)) for f in (example.theirs, example.ours)]
    times: list[list[float]] = [[], []]
    values: list[Any] = []
    for grad, spent in zip(grads, times, strict=True):
        start = time.perf_counter()
        values.append(jax.block_until_ready(grad(example.hparams)))
        spent.append(time.perf_counter() - start)
    ends = [jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(value)]) for value in values]
    error = float(jnp.linalg.norm(ends[0] - ends[1]) / jnp.linalg.norm(ends[0]))
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows down both
        for grad, spent in zip(grads, times, strict=True):
            start = time.process_time()
            jax.block_until_ready(grad(example.hparams))
            spent.append(time.process_time() - start)
    theirs, ours = (1e3 * sorted(spent[1:])[ROUNDS // 2] for spent in times)
    print(
        f"difference {error:.1e} | first call {times[0][0]:.1f} / {times[1][0]:.1f} s | gradient {theirs:.2f} / "
        f"{ours:.2f} ms | ratio {ours / theirs:.2f}",
        flush=True,
    )
    if error > 1e-2:
        raise SystemExit("The gradients differ.")


def main() -> None:
    """Measure each example. The lines are counted in the code of the derivative."""
    names = sys.argv[1:] or [example.__name__ for example in EXAMPLES]
    for example in (example for example in EXAMPLES if example.__name__ in names):
        source = inspect.getsource(example).splitlines()
        first = next(i for i, line in enumerate(source) if "def theirs" in line)
        middle = next(i for i, line in enumerate(source) if "@bilevel_jax" in line)
        last = next(i for i, line in enumerate(source) if line.startswith("    return Example"))
        lines = [sum(bool(line.strip()) for line in part) for part in (source[first:middle], source[middle:last])]
        print(f"{example.__name__}: lines {lines[0]} / {lines[1]} | ", end="")
        measure(example())


if __name__ == "__main__":
    main()

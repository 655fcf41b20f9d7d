"""A small tanh network with a decay per weight and a weight per example, and products with its curvature."""

from functools import cache

import numpy as np

import bilevel as bl


def arrays(seed=0, samples=10, dtype=np.float64):
    """Return weights, a log decay per weight and log weight per example, inputs, classes, and validation data."""
    rng = np.random.default_rng(seed)
    shapes = {"A": (3, 4), "a": (4,), "B": (4, 3), "b": (3,)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    hparams = {
        "decay": {name: rng.standard_normal(shape).astype(dtype) - 1 for name, shape in shapes.items()},
        "weight": rng.standard_normal(samples).astype(dtype),
    }
    x, xv = (rng.standard_normal((samples, 3)).astype(dtype) for _ in range(2))
    y, yv = (np.eye(3, dtype=dtype)[rng.integers(0, 3, samples)] for _ in range(2))
    return params, hparams, (x, y), (xv, yv)


def move(backend, tree):
    if isinstance(tree, dict):
        return {name: move(backend, leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return tuple(move(backend, leaf) for leaf in tree)
    return backend.from_numpy(tree)


def network(xp):
    def run(w, x):
        return xp.tanh(x @ w["A"] + w["a"]) @ w["B"] + w["b"]

    return run


def cross_entropies(xp, z, y):
    top = xp.amax(z, 1)
    return xp.log(xp.exp(z - top[:, None]).sum(1)) + top - (z * y).sum(1)


@cache  # the same functions for all tests, so that JAX compiles once
def classifier(xp, **options):
    """Return a problem with a decay per weight and a weight per example; Gauss-Newton unless told otherwise."""
    run = network(xp)

    def model(w, h, x):
        return run(w, x), xp.exp(h["weight"])

    def loss(output, y):
        z, weight = output
        return (weight * cross_entropies(xp, z, y)).mean()

    def penalty(w, h):
        return sum((xp.exp(h["decay"][name]) * w[name] ** 2).sum() for name in w)

    def outer(w, h, x, y):
        return cross_entropies(xp, run(w, x), y).mean()

    return bl.Problem.from_model(model, loss, outer, penalty=penalty, **options)


def products(backend, problem, point):
    """Return the matrix of hvp, the gradient, and the cross product and hvp of some vector, as NumPy arrays."""
    found = backend.run(_products, problem, point)
    return [np.asarray(backend.to_numpy(x)) for x in found]


def _products(backend, problem, point):
    space = backend.space(point.params)
    found = problem.linearize(backend, point.params, point.hparams, point.inner_args)
    v = space.normal(1)
    matrix, cross = space.materialise(found.vjp_params), found.vjp_hparams(v)
    return matrix, space.ravel(found.residual), space.ravel(cross), space.ravel(found.vjp_params(v))


def both_ways(backend, problem, point):
    at, of_params, of_hparams = (backend, *point[:3]), backend.space(point.params), backend.space(point.hparams)
    exact = bl.Problem(problem.inner, problem.outer).linearize(*at)
    u, v = of_hparams.normal(1), of_params.normal(2)
    return of_params.dot(v, problem.linearize(*at).jvp_hparams(u)), of_hparams.dot(u, exact.vjp_hparams(v))

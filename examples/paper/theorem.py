"""Check theorem 2 of the paper: K Neumann products are K + 1 unrolled steps from the optimum.

    python examples/paper/theorem.py

Theorem 2 (Lorraine, Vicol & Duvenaud 2020): where gradient descent with a step of α starts at the optimum w*, the
derivative of K + 1 steps is the Neumann series after K products, and tends to the implicit derivative, with an error
of at most (1 − αμ)^(K+1) for α ≤ 1/λmax, where μ and λmax are the least and the largest eigenvalue of the Hessian.

Two systems, each of one definition for all frameworks: a quadratic of 50 weights, and a network with a softplus layer
and a weight decay for each weight, solved until the norm of the gradient is below 1e-10. All in float64.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bilevel as bl
from bilevel.testing import check_hypergradient
from optimum import optimum
from runs import options, show, stored, variants

FULL = {"terms": [0, 1, 3, 10, 30, 100, 300, 1000, 3000], "hidden": 8}
FAST = {"terms": [0, 100], "hidden": 3}
VARIANTS = ["quadratic-numpy", "quadratic-torch", "quadratic-jax", "network-torch", "network-jax"]


class System(NamedTuple):
    """A problem at the optimum of its inner objective, and the data of its two objectives."""

    problem: bl.Problem
    params: Any
    hparams: Any
    inner_args: tuple[Any, ...] = ()
    outer_args: tuple[Any, ...] = ()


def quadratic(array: Any, xp: Any, sizes: dict[str, Any]) -> System:
    """Return a quadratic with eigenvalues from 0.02 to 1, and an outer objective that depends on λ itself, too."""
    del xp, sizes
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    hessian = basis @ np.diag(np.geomspace(0.02, 1.0, 50)) @ basis.T
    coupling, target, direct, hparams = (rng.normal(size=size) for size in ((50, 10), 50, 10, 10))
    params = np.linalg.solve(hessian, coupling @ hparams)
    problem = bl.problems.quadratic(array(hessian), array(coupling), array(target), direct=array(direct))
    return System(problem, array(params), array(hparams))


def network(array: Any, xp: Any, sizes: dict[str, Any]) -> System:
    """Return a regression by a two-layer network, trained to the optimum."""

    def output(params: Any, x: Any) -> Any:
        z = x @ params["hidden"]
        return xp.logaddexp(z, 0 * z) @ params["output"]  # a softplus

    def inner(params: Any, log_decay: Any, x: Any, y: Any) -> Any:
        decay = sum((xp.exp(log_decay[name]) * params[name] ** 2).sum() for name in params)
        return ((output(params, x) - y) ** 2).mean() + decay

    def outer(params: Any, log_decay: Any, x: Any, y: Any) -> Any:
        return ((output(params, x) - y) ** 2).mean() + 1e-3 * sum(leaf.sum() for leaf in log_decay.values())

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 5))
    y = np.sin(x[:, 0]) + x[:, 1] ** 2 / 2 + 0.1 * rng.normal(size=80)
    train, validation = (array(x[:40]), array(y[:40])), (array(x[40:]), array(y[40:]))
    shapes = {"hidden": (5, sizes["hidden"]), "output": (sizes["hidden"],)}
    hparams = {name: array(np.full(shape, -3.0)) for name, shape in shapes.items()}
    start = {name: array(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}
    problem = bl.Problem(inner, outer)
    return System(problem, optimum(problem, start, hparams, train), hparams, train, validation)


SYSTEMS = {"quadratic": quadratic, "network": network}


def run(name: str, sizes: dict[str, Any], solver: Any, path: Path) -> dict[str, Any]:
    """Compare the series, the unrolled steps and the implicit hypergradient of a system in a framework."""
    del path  # seconds, not worth a checkpoint
    kind, _, framework = name.partition("-")
    if framework == "jax":  # which starts in float32
        import_module("jax").config.update("jax_enable_x64", True)
    backend = bl.get_backend(framework)
    xp = import_module("jax.numpy" if framework == "jax" else framework)
    problem, params, hparams, inner_args, outer_args = SYSTEMS[kind](backend.from_numpy, xp, sizes)
    data = {"inner_args": inner_args, "outer_args": outer_args}

    def hypergradient(solver: Any, **call: Any) -> tuple[np.ndarray, np.ndarray, bl.Status]:
        hg = bl.hypergradient(problem, params, hparams, solver=solver, **data, **call)
        grad, adjoint = (backend.to_flat(tree) for tree in (hg.grad, hg.adjoint))
        return grad, adjoint, hg.info.status

    at_optimum = problem.linearize(backend, params, hparams, inner_args)
    hessian = backend.space(params).materialise(at_optimum.vjp_params)
    eigenvalues = np.linalg.eigvalsh(backend.to_numpy(hessian))
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    exact, adjoint, _ = hypergradient("exact")
    if solver is not None:
        return {"result": {"error": distance(hypergradient(solver)[0], exact)}}

    rows = []
    for terms in sizes["terms"]:
        series, v, _ = hypergradient(bl.Neumann(terms=terms, step_size=1 / largest))
        unrolled, _, _ = hypergradient(bl.Unrolled(steps=terms + 1, step_size=1 / largest))
        rows.append(
            {
                "terms": terms,
                "difference": distance(series, unrolled),
                "error": distance(series, exact),
                "adjoint_error": distance(v, adjoint),
                "bound": (1 - smallest / largest) ** (terms + 1),
            }
        )
    check_hypergradient(  # with a tolerance of 1e-5: raises unless solving again at other λ says the same
        problem, params, hparams, solver="exact", reference="finite-differences", rtol=1e-5, **data
    )
    above, below = (bl.Neumann(terms=200, step_size=factor / largest) for factor in (2.1, 1.9))
    result = {
        "weights": len(eigenvalues),
        "condition": largest / smallest,
        "difference": max(row["difference"] for row in rows),
        "error": rows[-1]["error"],
        "above 2/λmax": hypergradient(above, on_failure="ignore")[2].name,
        "below 2/λmax": hypergradient(below, on_failure="ignore")[2].name,
    }
    return {"rows": rows, "hypergradient": exact[:5].tolist(), "result": result}


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return norm(x - y) / norm(y)."""
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run all systems, print what came out, and return their histories."""
    arguments = options(__doc__, argv)
    sizes = FAST if arguments.fast else FULL
    histories = {}
    for name, solver in variants(arguments, dict.fromkeys(VARIANTS)).items():
        runner = partial(run, "network-torch" if name == "config" else name, sizes, solver)
        histories[name] = stored(arguments, "theorem", name, {**sizes, "solver": solver}, runner)
    show(histories)
    return histories


if __name__ == "__main__":
    main()

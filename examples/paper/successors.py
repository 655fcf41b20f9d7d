"""Race what came after the paper, on logistic regression with a penalty for each of the 123 features of a9a.

    python examples/paper/successors.py --data DIR

The hypergradients of HOAG (Pedregosa 2016, by `bl.minimize`), SOBA and AmIGO (Dagréou et al. 2022, Arbel & Mairal
2022: a few products from a warm start), F2SA (Kwon et al. 2023: gradients alone), Nyström (Hataya & Yamada 2023),
Gauss-Newton, CG, and the identity of T1-T2 (Luketina et al. 2016), all against L-BFGS on exact hypergradients.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import special
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel as bl
from bilevel import scipy_fit
from data import adult
from runs import options, show, stored, variants

FULL = {"steps": 200, "judged": 8, "iterations": 40}
FAST = {"steps": 100, "judged": 2, "iterations": 30}
START, BOUNDS = -4.0, (-8.0, 0.0)  # of the log penalties
INNER_STEPS, OUTER_RATE = 20, 0.1  # the rate falls to zero, so that the inner problem catches up
PROBLEM = bl.problems.logistic_regression()
SIGMA = 100.0  # F2SA's weight of the inner objective
SETTINGS = {"start": START, "bounds": BOUNDS, "rate": OUTER_RATE, "sigma": SIGMA}


class Method(NamedTuple):
    """An alternating loop: so many steps of gradient descent, then one of Adam along a hypergradient."""

    inner_steps: int
    solver: Any  # for bl.WarmStart, which starts where the last step has ended


class Data(NamedTuple):
    """Pairs of sparse features and labels."""

    train: tuple[Any, Any]
    validation: tuple[Any, Any]
    test: tuple[Any, Any]


CG = {"name": "cg", "rtol": 0.1, "maxiter": 500}
METHODS = {
    "reference": None,
    "hoag": None,
    "f2sa": Method(INNER_STEPS, None),
    "identity": Method(INNER_STEPS, "identity"),
    "soba": Method(1, {"name": "neumann", "terms": 1}),
    "amigo": Method(INNER_STEPS, {"name": "neumann", "terms": 10}),
    "cg": Method(INNER_STEPS, CG),
    "gauss-newton": Method(INNER_STEPS, CG),
    "nystrom": Method(INNER_STEPS, {"name": "nystrom", "rank": 60, "damping": 0.1, "rtol": 0.5}),
}


def split(folder: Path | None, seed: int) -> Data:
    """Return two thirds of what there is to train on, one third for validation, and the test set."""
    _, X, y, X_test, y_test = adult(folder)
    order, cut = np.random.default_rng(seed).permutation(len(y)), 2 * len(y) // 3
    return Data((X[order[:cut]], y[order[:cut]]), (X[order[cut:]], y[order[cut:]]), (X_test, y_test))


def optimum(hparams: np.ndarray, params: np.ndarray, X: Any, y: Any) -> np.ndarray:
    """Solve the inner problem to rounding: by L-BFGS, then by Newton's method."""
    params = scipy_fit(PROBLEM, inner_args=(X, y), gtol=1e-6)(hparams, params)
    for _ in range(10):
        gradient = PROBLEM.inner.grad(params, hparams, X, y)
        if np.linalg.norm(gradient) < 1e-10:
            break
        p = special.expit(X @ params)
        hessian = (X.T @ X.multiply((p * (1 - p))[:, None]).tocsr()).toarray() / len(y) + np.diag(np.exp(hparams))
        params = params - np.linalg.solve(hessian, gradient)
    return params


def hypergradients(name: str, data: Data) -> Callable[..., np.ndarray]:
    """Return what computes hypergradients from params, hparams and a solver: for Gauss-Newton products, PyTorch."""
    if name != "gauss-newton":
        data_args = {"inner_args": data.train, "outer_args": data.validation}
        return lambda w, hparams, solver: bl.hypergradient(PROBLEM, w, hparams, solver=solver, **data_args).grad
    loss = binary_cross_entropy_with_logits
    problem = bl.Problem.from_model(
        lambda params, hparams, X: X @ params,
        loss,
        lambda params, hparams, X, y: loss(X @ params, y),
        penalty=lambda params, hparams: 0.5 * (hparams.exp() * params**2).sum(),
    )
    train, validation = (
        (torch.from_numpy(X.toarray()), torch.from_numpy(y.astype(float))) for X, y in (data.train, data.validation)
    )

    def by_gauss_newton(w: np.ndarray, hparams: np.ndarray, solver: Any) -> np.ndarray:
        point = torch.from_numpy(w), torch.from_numpy(hparams)
        return bl.hypergradient(problem, *point, inner_args=train, outer_args=validation, solver=solver).grad.numpy()

    return by_gauss_newton


def loop(name: str, method: Method, data: Data, sizes: dict[str, int]) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Return CPU seconds so far, hyperparameters and their hypergradient, every so many steps."""
    X, y = data.train
    hparams, w = np.full(X.shape[1], START), np.zeros(X.shape[1])
    penalized = w  # F2SA's second copy, which minimizes L + F/σ
    most = np.full_like(hparams, BOUNDS[1])  # the curvature is largest there
    step_size = bl.prepare("neumann", PROBLEM, w, most, inner_args=data.train).state
    solver = method.solver and bl.get_solver(method.solver)
    for option in ("step_size", "scale"):  # of Neumann and the identity, unless it is the user's solver
        if hasattr(solver, option) and name != "config":
            solver = bl.get_solver(solver, **{option: step_size})
    solver = solver and bl.WarmStart(solver, prepare_every=10)
    hypergradient = hypergradients(name, data)
    moment, square, seen, seconds = 0.0, 0.0, [], 0.0
    for step in range(1, sizes["steps"] + 1):
        began = time.process_time()
        for _ in range(method.inner_steps):
            w = w - step_size * PROBLEM.inner.grad(w, hparams, X, y)
            if solver is None:
                outer_grad, _ = PROBLEM.outer.grad(penalized, hparams, *data.validation)
                penalized = penalized - step_size * (PROBLEM.inner.grad(penalized, hparams, X, y) + outer_grad / SIGMA)
        if solver is None:
            grad = SIGMA * np.exp(hparams) * (penalized**2 - w**2) / 2
        else:
            grad = hypergradient(w, hparams, solver)
        at = hparams
        moment, square = 0.9 * moment + 0.1 * grad, 0.999 * square + 0.001 * grad**2  # Adam
        update = moment / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-12)
        hparams = np.clip(hparams - OUTER_RATE * (1 - step / sizes["steps"]) * update, *BOUNDS)
        seconds += time.process_time() - began
        if step % (sizes["steps"] // sizes["judged"]) == 0:
            seen.append((seconds, at, grad))
    return seen


def search(name: str, data: Data, sizes: dict[str, int]) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Return the same of L-BFGS by `bl.minimize`: on exact hypergradients, or on approximate ones (HOAG)."""
    zeros, seen, began = np.zeros(data.train[0].shape[1]), [], time.process_time()
    solver, fit = "exact", lambda hparams, params: optimum(hparams, params, *data.train)
    if name == "hoag":
        solver, fit = {"name": "cg", "rtol": 1e-4, "maxiter": 500}, scipy_fit(PROBLEM, inner_args=data.train, gtol=1e-5)
    bl.minimize(
        PROBLEM,
        np.full_like(zeros, START),
        fit=fit,
        params0=zeros,
        inner_args=data.train,
        outer_args=data.validation,
        solver=solver,
        bounds=BOUNDS,
        maxiter=sizes["iterations"],
        callback=lambda found: seen.append((time.process_time() - began, found.x, found.jac)),
    )
    return [seen[i] for i in np.unique(np.geomspace(1, len(seen), sizes["judged"]).astype(int) - 1)]


def run(name: str, method: Method | None, folder: Path | None, sizes: dict[str, int], seed: int, path: Path) -> Any:
    """Run a method, then judge it where it was: at the optimum for its hyperparameters, by the exact hypergradient."""
    del path  # seconds, not worth a checkpoint
    data = split(folder, seed)
    w = np.zeros(data.train[0].shape[1])
    rows = []
    for seconds, hparams, grad in search(name, data, sizes) if method is None else loop(name, method, data, sizes):
        w = optimum(hparams, w, *data.train)
        exact = bl.hypergradient(PROBLEM, w, hparams, inner_args=data.train, outer_args=data.validation, solver="exact")
        norms = np.linalg.norm(exact.grad), np.linalg.norm(grad)
        row = {
            "CPU seconds": seconds,
            "validation loss": exact.value,
            "test loss": PROBLEM.outer(w, hparams, *data.test),
            "cosine": exact.grad @ grad / (norms[0] * norms[1]),
            "error": np.linalg.norm(grad - exact.grad) / norms[0],
        }
        rows.append({key: float(value) for key, value in row.items()})
    return {"rows": rows, "result": rows[-1]}


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run all methods, print what came out, and return their histories."""
    arguments = options(__doc__, argv, seeds=2)
    sizes = FAST if arguments.fast else FULL
    data_name, *_ = adult(arguments.data)
    histories = {}
    for name, method in variants(arguments, METHODS).items():
        method = Method(INNER_STEPS, method) if name == "config" else method
        for seed in arguments.seeds:
            settings = {**sizes, **SETTINGS, "data": data_name, "method": method, "seed": seed}
            runner = partial(run, name, method, arguments.data, sizes, seed)
            histories[f"{name}-{seed}"] = stored(arguments, "successors", f"{name}-{seed}", settings, runner)
    show(histories)
    return histories


if __name__ == "__main__":
    main()

"""Count the products that warm starts save in hyperparameter tuning, and see what a few products a step are worth.

    python benchmarks/warm_start.py --out docs/warm-start.png

Softmax regression on scikit-learn's digits with a penalty for each weight (650); 60 steps of gradient descent on the
penalties' logarithms, the weights retrained after each. Counted are the products of `CG` at rtol = 1e-3, those of its
checks too.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import bilevel as bl
from bilevel import scipy_fit

STEPS, RATE = 60, 20.0


class Counting:
    """An inner objective that counts its Hessian-vector products."""

    def __init__(self, inner):
        self.inner, self.products = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args):
        return self.inner(*args)

    def hvp(self, *args):
        self.products += 1
        return self.inner.hvp(*args)


def data():
    """Return training and validation data."""
    X, y = load_digits(return_X_y=True)
    X = np.hstack([X / 16, np.ones((len(X), 1))])
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order[:500]], y[order[:500]]), (X[order[500:1000]], y[order[500:1000]])


def path(train, val):
    """Return the weights and penalties along the outer steps of accurate hypergradients, and these."""
    problem = bl.problems.logistic_regression()
    fit = scipy_fit(problem, inner_args=train)
    w, h, points = None, np.full((65, 10), np.log(1e-2)), []
    w = fit(h, np.zeros((65, 10)))
    for _ in range(STEPS):
        hg = bl.hypergradient(problem, w, h, inner_args=train, outer_args=val, solver=bl.CG(rtol=1e-9, maxiter=2000))
        points.append((w, h, hg.grad))
        h = h - RATE * hg.grad
        w = fit(h, w)
    return points


def follow(points, train, val, solver, start):
    """Return the products and the error of the hypergradient at each point, with a rule for the warm start."""
    problem = bl.problems.logistic_regression()
    inner = Counting(problem.inner)
    problem = bl.Problem(inner, problem.outer)
    products, errors, last, before = [], [], None, None
    for w, h, exact in points:
        counted = inner.products
        hg = bl.hypergradient(
            problem,
            w,
            h,
            inner_args=train,
            outer_args=val,
            solver=solver,
            adjoint0=start(last, before),
            on_failure="ignore",
        )
        last, before = hg.adjoint, last
        products.append(inner.products - counted)
        errors.append(np.linalg.norm(hg.grad - exact) / np.linalg.norm(exact))
    return np.array(products), np.array(errors)


STARTS = {
    "cold": ("0.5", lambda last, before: None),
    "warm": ("C0", lambda last, before: last),
    "warm, extrapolated": ("C1", lambda last, before: last if last is None else bl.extrapolate(last, before)),
}


def main():
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("warm-start.png"))
    arguments = parser.parse_args()
    train, val = data()
    points = path(train, val)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained")
    for name, (color, start) in STARTS.items():
        products, errors = follow(points, train, val, bl.CG(rtol=1e-3), start)
        print(f"rtol 1e-3, {name}: {products.sum()} products, largest error {errors.max():.1e}")
        left.plot(np.cumsum(products), color=color, label=name)
        for steps, style in ((1, ":"), (2, "--"), (5, "-")):
            products, errors = follow(points, train, val, bl.CG(maxiter=steps, rtol=0), start)
            print(f"{steps} steps, {name}: {products.sum()} products, error at the end {errors[-1]:.1e}")
            right.plot(errors, color=color, linestyle=style, label=f"{name}, {steps} step{'s' * (steps > 1)} of CG")
    left.set(title="Products to rtol = 1e-3", xlabel="outer step", ylabel="products so far")
    right.set(title="Error of the hypergradient", xlabel="outer step", ylabel="relative error", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=9)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(arguments.out, dpi=110)
    print(arguments.out)


if __name__ == "__main__":
    main()

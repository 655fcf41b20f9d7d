"""A weight for every training example of a scikit-learn classifier, where a quarter of the labels are wrong.

scikit-learn trains, by ``fit(X, y, sample_weight=weights)``. Nothing differentiates that, so the derivatives of its
objective are written out, and `bl.hypergradient_from` makes of them the gradient, by all the weights, of the loss on a
few labels that are known to be right.

    python examples/scipy/estimator.py
    python examples/scipy/estimator.py --config examples/solver.toml
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import GridSearchCV

import bilevel as bl

TRAIN, VALIDATION, WRONG = 800, 100, 0.3


class Part(NamedTuple):
    """Images of shape (n, pixels) and the digits they are said to show, of shape (n,)."""

    X: Any
    y: Any


def load(seed: int) -> tuple[Part, Part, Part, Any]:
    """Return digits to train on, for validation and to test, and what is true of those to train on."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order, cuts = rng.permutation(len(y)), [TRAIN, TRAIN + VALIDATION]
    train, validation, test = map(Part, np.split(X[order] / 16, cuts), np.split(y[order], cuts))
    wrong = rng.random(TRAIN) < WRONG
    return train._replace(y=np.where(wrong, rng.integers(0, 10, TRAIN), train.y)), validation, test, train.y


def linearize(model: LogisticRegression, weights: Any, train: Part, validation: Part) -> bl.Linearization:
    """Return the derivatives of F = log loss(validation) and of L, which ``fit`` has minimized.

    Over n and C, so that its size depends on neither, L = 1/n Σᵢ weightᵢ log lossᵢ + 1/(2 C n) ‖coef‖². λ is the
    weights, w is ``coef_.T`` and below it ``intercept_``, which scikit-learn does not penalize.
    """
    n, n_val = len(train.y), len(validation.y)
    A, A_val = (np.column_stack([part.X, np.ones(len(part.X))]) for part in (train, validation))
    p, p_val = model.predict_proba(train.X), model.predict_proba(validation.X)
    errors, errors_val = p - (train.y[:, None] == model.classes_), p_val - (validation.y[:, None] == model.classes_)
    penalty = np.append(np.full(A.shape[1] - 1, 1 / (model.C * n)), 0.0)[:, None]
    shares = weights[:, None] * p / n

    def hvp(v: Any) -> Any:
        z = A @ v
        return A.T @ (shares * (z - (p * z).sum(1, keepdims=True))) + penalty * v

    return bl.Linearization(
        value=log_loss(validation.y, p_val, labels=model.classes_),
        grad_params=A_val.T @ errors_val / n_val,
        grad_hparams=None,  # the weights have no say in F but through w
        hvp=hvp,
        cross_vjp=lambda v: (errors * (A @ v)).sum(1) / n,
    )


def score(model: Any, part: Part) -> tuple[float, float]:
    """Return the log loss and the accuracy of a fitted model."""
    p = model.predict_proba(part.X)
    return log_loss(part.y, p, labels=model.classes_), np.mean(model.classes_[p.argmax(1)] == part.y)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Tune the weights, print a table, and return what it says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="a file with a table [solver]; default: CG")
    parser.add_argument("--steps", type=int, default=40, help="hypergradients to follow (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the wrong labels (0)")
    arguments = parser.parse_args(argv)
    solver = bl.get_solver(arguments.config or "cg")

    train, validation, test, truth = load(arguments.seed)
    results: dict[str, Any] = {"solver": solver}
    print(f"{solver}\n\n{'log loss and accuracy':<40}{'validation':>18}{'test':>18}")

    def report(name: str, label: str, model: Any) -> None:
        results[name] = validated, tested = score(model, validation), score(model, test)
        print(f"{label:<40}{validated[0]:>10.3f}{validated[1]:>8.1%}{tested[0]:>10.3f}{tested[1]:>8.1%}")

    # A hypergradient is as good as the minimum it is taken at, and the default tol of 1e-4 ends some way from one.
    model = LogisticRegression(solver="newton-cg", tol=1e-8, warm_start=True)
    report("untuned", "all weights 1", model.fit(*train))
    weights, adjoint = np.ones(TRAIN), None
    for _ in range(arguments.steps):
        hg = bl.hypergradient_from(linearize(model, weights, train, validation), solver=solver, adjoint0=adjoint)
        adjoint = hg.adjoint
        weights = np.clip(weights - 0.2 * hg.grad / np.abs(hg.grad).max(), 0.0, 1.0)
        model.fit(*train, sample_weight=weights)
    report("tuned", "weights tuned", model)
    report("truth", "out of reach: all labels right", LogisticRegression(solver="newton-cg").fit(train.X, truth))
    grid = GridSearchCV(LogisticRegression(solver="newton-cg"), {"C": np.logspace(-2, 2, 9)}, scoring="neg_log_loss")
    report("clean", "validation labels alone, C by 5 folds", grid.fit(*validation))

    wrong = train.y != truth
    results |= {"weights": weights, "found": roc_auc_score(wrong, -weights)}
    print(
        f"\nmean weight: {weights[~wrong].mean():.2f} where the label is right, {weights[wrong].mean():.2f} where wrong"
    )
    print(f"a wrong label has less weight than a right one in {results['found']:.1%} of all pairs")
    return results


if __name__ == "__main__":
    main()

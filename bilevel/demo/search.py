"""The demo's computations: a grid search for one penalty, the tuning of all, and a check of the hypergradient."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from bilevel.backend import Backend
from bilevel.demo.data import Digits
from bilevel.demo.models import Model
from bilevel.hypergradient import hypergradient
from bilevel.linear_solvers import Exact, LinearSolver
from bilevel.methods import Method
from bilevel.search.inner_solver import scipy_fit
from bilevel.search.minimize import minimize
from bilevel.spaces.tree import tree_map


class Score(NamedTuple):
    """Mean cross-entropy and fraction of recognized digits, on the validation and the test images."""

    validation_loss: float
    validation_accuracy: float
    test_loss: float
    test_accuracy: float


class Outcome(NamedTuple):
    """The results of a run."""

    scores: list[Score]  # at the start of the tuning and after each iteration
    shared: Score  # with the best shared penalty
    shared_penalty: float
    pixel_penalties: np.ndarray  # tuned, of shape (pixels, k)
    hyperparameters: int
    hypergradients: int
    failures: int  # hypergradients that did not converge
    steps: int  # total steps of the solver


class Run(NamedTuple):
    """A run of the demo: the name of the backend, the results, the wall time in seconds, and the picture's path."""

    backend: str
    outcome: Outcome
    seconds: float
    picture: Path


class Task:
    """A model and its data on a backend."""

    def __init__(self, model: Model, digits: Digits, backend: Backend, seed: int) -> None:
        self.model, self.backend = model, backend
        params0 = model.params0(np.random.default_rng(seed), digits.train.X.shape[1])
        self.params0 = tree_map(backend.from_numpy, params0)
        self.train, self.validation, self.test = (
            (backend.from_numpy(model.features(part.X)), backend.from_numpy(part.y)) for part in digits
        )
        self.fit = scipy_fit(model.problem, inner_args=self.train, gtol=model.gtol, backend=backend)

    @property
    def size(self) -> int:
        """Return the number of weights, which equals the number of hyperparameters."""
        return self.backend.space(self.params0).size

    def shared(self, penalty: float) -> Any:
        """Return hyperparameters with one penalty for all weights."""
        space = self.backend.space(self.params0)
        return space.scale(float(np.log(penalty)), space.map(space.leaf_xp.ones_like, self.params0))

    def score(self, params: object) -> Score:
        """Return losses and accuracies, without the penalty."""
        scores = []
        for X, y in (self.validation, self.test):
            loss = self.backend.to_host(self.model.problem.outer(params, None, X, y))
            guess = self.backend.to_numpy(self.model.logits(params, X)).argmax(1)
            scores += [loss, float((guess == self.backend.to_numpy(y)).mean())]
        return Score(*scores)

    def tune(self, solver: LinearSolver[Any] | Method) -> Outcome:
        """Search the grid for a shared penalty; then tune a penalty per weight from the same fixed start."""
        model, backend = self.model, self.backend
        penalties = tqdm(model.grid, "grid search", leave=False, disable=None)  # None: only on a terminal
        grid = [(self.score(self.fit(self.shared(p), self.params0)), p) for p in penalties]
        shared, penalty = min(grid, key=lambda found: found[0].validation_loss)
        start = self.shared(model.start)
        params0 = self.fit(start, self.params0)
        scores = [self.score(params0)]
        found = minimize(
            model.problem,
            start,
            fit=self.fit,
            params0=params0,
            inner_args=self.train,
            outer_args=self.validation,
            solver=solver,
            bounds=tuple(np.log(model.bounds)),
            maxiter=model.maxiter,
            callback=lambda result: scores.append(self.score(result.params)),
            options=model.options,
            backend=backend,
        )
        return Outcome(
            scores=scores,
            shared=shared,
            shared_penalty=penalty,
            pixel_penalties=np.exp(model.pixel_weights(tree_map(backend.to_numpy, found.x))),
            hyperparameters=self.size,
            hypergradients=found.nfev,
            failures=sum(bool(solver.failed(evaluation.status)) for evaluation in found.history),
            steps=sum(evaluation.steps for evaluation in found.history),
        )

    def errors(self, solver: LinearSolver[Any] | Method) -> list[float]:
        """Return the relative error of the hypergradient at the start, compared with the dense Hessian's result.

        The Hessian has the solver's damping. If the damping is not zero, the second error is the error without it.
        """
        hparams, space = self.shared(self.model.start), self.backend.space(self.params0)
        params = self.fit(hparams, self.params0)

        def solve(solver: LinearSolver[Any] | Method) -> Any:
            return hypergradient(
                self.model.problem,
                params,
                hparams,
                inner_args=self.train,
                outer_args=self.validation,
                solver=solver,
                backend=self.backend,
            )

        def norm(tree: object) -> float:
            return float(self.backend.to_host(space.norm(tree)))

        hg = solve(solver)
        dampings = [hg.info.damping, 0.0] if hg.info.damping else [0.0]
        exact = [solve(Exact(damping=damping)).grad for damping in dampings]
        return [norm(space.subtract(hg.grad, e)) / norm(e) for e in exact]

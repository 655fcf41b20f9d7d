"""Estimates of the prediction error that need no held-out data: SURE and generalized cross-validation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.options import check_int, check_real
from bilevel.problems.k_fold import KFoldProblem
from bilevel.problems.linear import linear_model
from bilevel.problems.losses import LeastSquares
from bilevel.problems.protocols import BilevelProblem
from bilevel.prox.operator import constant_like
from bilevel.spaces.array import Args


def sure(problem: BilevelProblem, sigma: float, *, seed: int = 0) -> KFoldProblem:
    """Return a regression whose outer objective is Stein's unbiased risk estimate (SURE).

        F = 1/n ‖Xw − y‖² − σ² + 2 σ² df / n   with   df = δ·X(w' − w)/ε

    estimates the mean squared error of Xw as a prediction of E[y], for targets with independent normal errors of
    standard deviation σ. w' solves the inner problem for the targets y + ε δ, with one vector δ of normal random
    numbers. df estimates the degrees of freedom by a finite difference, with ε = 2 σ / n^0.3 (Deledalle et al., SIAM
    J. Imaging Sci. 2014). So all data train. ``params`` are the list [w, w'], and ``inner_args`` = ``outer_args`` =
    (X, y).

    Args:
        problem: `bl.problems.ridge`, `lasso` or `elastic_net`.
        sigma: σ > 0, in the units of y.
        seed: of δ.

    Returns:
        The problem, for `bl.hypergradient`, `bl.minimize`, `bl.newton_fit` and `bl.scipy_fit`.

    Raises:
        TypeError: if the problem is no regression with a squared error.
        ValueError: unless σ is positive.

    >>> import numpy as np, bilevel as bl
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((50, 20))
    >>> y = X[:, 0] + rng.standard_normal(50)
    >>> problem = sure(bl.problems.ridge(), sigma=1.0)
    >>> data = {"inner_args": (X, y), "outer_args": (X, y)}
    >>> fit = bl.newton_fit(problem, inner_args=(X, y))
    >>> found = bl.minimize(problem, np.zeros(20), fit=fit, bounds=(-8, 8), **data)
    >>> bool(found.x[0] < np.median(found.x[1:]))  # one feature matters
    True
    """
    return RiskProblem(_checked("sure", problem), _Probe(seed, SURE(sigma)))


def gcv(problem: BilevelProblem, *, seed: int = 0) -> KFoldProblem:
    """Return a regression whose outer objective is generalized cross-validation (Golub, Heath & Wahba 1979).

        F = 1/n ‖Xw − y‖² / (1 − df / n)²

    The degrees of freedom df are as in `sure`, with the standard deviation of y in place of σ. No σ is needed.

    Args:
        problem, seed: as in `sure`.

    Returns:
        The problem, as for `sure`.

    Raises:
        TypeError: as for `sure`.
    """
    return RiskProblem(_checked("gcv", problem), _Probe(seed, GCV()))


class _Criterion(ABC):
    """A function of a = 1/n ‖Xw − y‖² and of the share of the degrees of freedom, s = df / n."""

    @abstractmethod
    def value(self, a: Any, s: Any) -> Any:
        raise NotImplementedError

    @abstractmethod
    def partials(self, a: Any, s: Any) -> tuple[Any, Any]:
        """Return the derivatives by a and s."""
        raise NotImplementedError

    @abstractmethod
    def scale(self, y: Any) -> Any:
        """Return the size of the errors of y."""
        raise NotImplementedError


@dataclass(frozen=True)
class SURE(_Criterion):
    """See `sure`."""

    sigma: float

    def __post_init__(self) -> None:
        check_real(self, "sigma", above=0)
        if np.ndim(self.sigma):
            raise ValueError(f"SURE.sigma: expected one number for all rows, got the shape {np.shape(self.sigma)}.")

    @override
    def value(self, a: Any, s: Any) -> Any:
        return a - self.sigma**2 + 2 * self.sigma**2 * s

    @override
    def partials(self, a: Any, s: Any) -> tuple[Any, Any]:
        return 1.0, 2 * self.sigma**2

    @override
    def scale(self, y: Any) -> Any:
        return self.sigma


@dataclass(frozen=True)
class GCV(_Criterion):
    """See `gcv`."""

    @override
    def value(self, a: Any, s: Any) -> Any:
        return a / (1 - s) ** 2

    @override
    def partials(self, a: Any, s: Any) -> tuple[Any, Any]:
        return 1 / (1 - s) ** 2, 2 * a / (1 - s) ** 3

    @override
    def scale(self, y: Any) -> Any:
        return ((y - y.mean()) ** 2).mean() ** 0.5


@dataclass(frozen=True)
class _Probe:
    """Two training sets in place of the folds of a `KFoldProblem`: the targets y, and y + ε δ."""

    seed: int
    criterion: _Criterion

    def __post_init__(self) -> None:
        check_int(self, "seed", least=0)

    def __len__(self) -> int:
        return 2

    def training(self, args: Args) -> list[Args]:
        X, y = _data(args)
        delta, eps = self.direction(y)
        return [(X, y), (X, y + eps * delta)]

    def direction(self, y: Any) -> tuple[Any, Any]:
        """Return δ and ε."""
        delta = np.random.default_rng(self.seed).standard_normal(tuple(y.shape))
        return constant_like(delta, y), 2 * self.criterion.scale(y) / len(y) ** 0.3


@dataclass(frozen=True)
class RiskProblem(KFoldProblem):
    """The problem that `bilevel.problems.sure` and `gcv` return: two inner problems side by side, and an estimate."""

    folds: Any  # a _Probe

    @property
    @override
    def outer(self) -> Any:
        """The estimate of the prediction error."""
        return _Risk(self.folds)


@dataclass(frozen=True)
class _Risk:
    probe: Any

    def __call__(self, params: list[Any], hparams: Any, *args: Any) -> Any:
        return self.probe.criterion.value(*self._measures(params, args)[:2])

    def grad(self, params: list[Any], hparams: Any, *args: Any) -> tuple[list[Any], None]:
        """Return (∂F/∂w, None) for the numpy backend. Other backends differentiate the call."""
        a, s, errors, delta = self._measures(params, args)
        by_a, by_s = self.probe.criterion.partials(a, s)
        X, n = args[0], args[1].size
        probing = by_s * (X.T @ delta) / n
        return [by_a * 2 * (X.T @ errors) / n - probing, probing], None

    def _measures(self, params: list[Any], args: Args) -> tuple[Any, Any, Any, Any]:
        """Return a, s, the errors Xw − y, and δ / ε."""
        X, y = _data(args)
        delta, eps = self.probe.direction(y)
        errors, delta = X @ params[0] - y, delta / eps
        return (errors**2).mean(), (delta * (X @ (params[1] - params[0]))).mean(), errors, delta


def _data(args: Args) -> tuple[Any, Any]:
    if len(args) != 2:
        raise TypeError(f"sure and gcv take the arguments (X, y), got {len(args)} arguments.")
    return args[0], args[1]


def _checked(name: str, problem: BilevelProblem) -> BilevelProblem:
    try:
        squared = isinstance(linear_model(problem).loss, LeastSquares)
    except TypeError:
        squared = False
    if not squared:
        raise TypeError(
            f"{name}: expected a regression with a squared error, such as bl.problems.ridge(), bl.problems.lasso() or "
            f"bl.problems.elastic_net(), got {type(problem).__name__}."
        )
    return problem

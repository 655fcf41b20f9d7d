"""Solve the inner problem by the user's training."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.testing.host import HostProblem
from bilevel.trainings import check_fit, check_fit_result
from bilevel.validation import check_like

Fit = Callable[[Any, Any], Any]
"""(hparams, params0) -> params, as in `bl.minimize`."""


def check_retraining(fit: object, damping: float) -> None:
    """Raise a TypeError unless fit is a training or None, and a ValueError if there is damping too."""
    if fit is None:
        return
    check_fit(fit)
    if damping:
        raise ValueError("damping: a training solves the inner problem without damping. Leave out fit or damping.")


class Retraining:
    """The results of a training at the caller's λ and nearby. Each training starts from the caller's params.

    Raises:
        TypeError, ValueError: if ``fit`` does not return params.
    """

    def __init__(self, host: HostProblem[Any, Any], fit: Fit) -> None:
        self.host, self.fit = host, fit
        self.w = self.follow(host.lam)

    def follow(self, lam: np.ndarray) -> np.ndarray:
        """Return the params that are trained with λ, of shape (n,)."""
        backend, params = self.host.backend, self.host.inputs.params
        start = self.host.at(self.host.w, lam)
        trained = check_fit_result(backend, self.fit(start.hparams, start.params))
        check_like(backend, "the result of fit", trained, "params", params)
        return backend.to_flat(trained)

"""Solve the inner problem by the user's training."""

from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.testing.host import HostProblem
from bilevel.validation import check_like

Fit = Callable[[Any, Any], Any]
"""(hparams, params0) -> params, as in `bl.minimize`."""


def check_fit(fit: object, damping: float) -> None:
    """Raise a TypeError unless fit is a function or None, and a ValueError if there is damping too."""
    if fit is not None and not callable(fit):
        raise TypeError(
            f"fit: expected a function of (hparams, params0) that returns params, got {type(fit).__name__}."
        )
    if fit is not None and damping:
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
        found = self.fit(start.hparams, start.params)
        if found is None:
            raise ValueError("fit: expected the new params, got None. Does the function return them?")
        check_like(backend, "the result of fit", found, "params", params)
        return backend.to_flat(found)

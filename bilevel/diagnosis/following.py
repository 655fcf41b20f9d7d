"""Find derivatives that other arrays than the arguments determine."""

import numpy as np

from bilevel.backend import Backend
from bilevel.inspection.derivatives import DERIVATIVES, Derivatives, derivatives
from bilevel.linearization import Inputs
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import H, P

SEED = 4


def changes(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[str, ...]:
    """Return the names of the derivatives that change if params and hparams are replaced by copies.

    Such an objective computes with other arrays than its arguments, for example with a tensor that was computed from
    params before. All names are returned if an objective does not depend on the copies.
    """
    if not backend.differentiates_arrays:
        return ()
    with backend.isolated(inputs, False) as at:
        try:
            found = backend.run(_derivatives, problem, at(inputs.params, inputs.hparams))
        except ValueError:
            return DERIVATIVES
    with backend.isolated(inputs, False):
        expected = backend.run(_derivatives, problem, inputs)
    return tuple(
        name
        for name, old, new in zip(DERIVATIVES, expected, found, strict=True)
        if not np.linalg.norm(backend.to_flat(new) - backend.to_flat(old))
        <= backend.space(inputs.params).eps ** 0.5 * np.linalg.norm(backend.to_flat(old))
    )


def _derivatives(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> Derivatives[P, H]:
    return derivatives(backend, problem, inputs, backend.space(inputs.params).normal(SEED))

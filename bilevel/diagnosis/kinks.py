"""Find a kink or a bound that holds the minimum."""

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.diagnosis.finding import Finding
from bilevel.inspection.entries import Arrays, Share, shares
from bilevel.linearization import Inputs
from bilevel.messages import listed
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Array, H, P

REST = 0.01  # the largest share of ‖∂L/∂w‖ in entries that are not at a bound
FLAT = 0.1  # the largest decrease of L at a kink, relative to the prediction
LONGEST = 0.01  # the longest step, relative to the norm of params
STEPS = 10.0 ** np.array([-1.0, -1.5, -2.0])  # relative to the longest step, or to the distance of the minimum
WAY_OUT = (
    "Use bl.Proximal with the proximal operator of the kink (bl.prox has |w|), or bl.Projected with the projection on "
    'the constraint (bl.projections has bounds): see "Kinks, bounds and constraints" in docs/problems.md.'
)


class Held(NamedTuple):
    """The evidence that a kink or a bound holds params.

    Attributes:
        descent: the decrease of L along −∂L/∂w, relative to the decrease that the gradient predicts, at the best of
            several small steps: 1 if L is smooth, at most 0 at a minimum with a kink. nan if it is unknown.
        shares: the entries that a bound seems to hold: they have a gradient, and are zero or equal to the least or
            largest value of their leaf. Empty if the other entries have more than almost no gradient.
        values: the values of these entries.
    """

    descent: float = float("nan")
    shares: tuple[Share, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def at_kink(self) -> bool:
        """Whether L does not decrease along −∂L/∂w."""
        return self.descent <= FLAT

    def findings(self, grad_norm: float) -> list[Finding]:
        """Return the finding, if there is one."""
        exactly = f"exactly {listed(f'{value:.4g}' for value in self.values)}"
        where = f" The gradient lies in {listed(self.shares)}, which are {exactly}." if self.shares else ""
        norm = f"the gradient of the inner loss has norm {grad_norm:.2g}"
        if self.at_kink:
            return [
                Finding(
                    "kink",
                    f"params is at a kink of the inner loss, perhaps at its minimum: {norm}, but the loss does not "
                    f"decrease along −∂L/∂w at any small step.{where} The formula of a hypergradient does not hold at "
                    "a kink.",
                    f"More training does not help. {WAY_OUT}",
                )
            ]
        # A leaf that is zero as a whole was probably never trained, as in LoRA.
        if self.shares and all(share.number < share.size for share in self.shares):
            return [
                Finding(
                    "kink",
                    f"A bound seems to hold params: {norm}, but the other entries have almost no gradient.{where} The "
                    "formula of a hypergradient does not hold at a bound.",
                    f"If there is a bound or a constraint, more training does not help. {WAY_OUT} If there is none, "
                    "train these entries too.",
                )
            ]
        return []


def evidence(params: Arrays, grad: Arrays, product: Arrays, decrease: float | None) -> Held:
    """Return the evidence from the entries of params, ∂L/∂w and a Hessian-vector product, and from `descent`."""
    found = Held() if decrease is None else Held(decrease)
    at_bound = {path: _at_bound(params[path]) for path in grad}
    rest = sum(float((np.where(at_bound[path], 0, g.astype(float)) ** 2).sum()) for path, g in grad.items())
    total = sum(float((g.astype(float) ** 2).sum()) for g in grad.values())
    # Unused weights, whose product is exactly zero, are no evidence.
    others = sum(int((~mask & (product[path] != 0)).sum()) for path, mask in at_bound.items())
    if not others or rest > REST**2 * total:
        return found
    values = {float(v) + 0.0 for path, g in grad.items() for v in params[path][at_bound[path] & (g != 0)]}
    where = shares(lambda mask, g: mask & (g != 0), at_bound, grad)
    return found._replace(shares=where, values=tuple(sorted(values)))


def _at_bound(w: np.ndarray) -> np.ndarray:
    """Return a mask of the entries that are zero, or that have the least or largest value, if several have it."""
    mask = w == 0
    for end in (w.min(initial=np.inf), w.max(initial=-np.inf)):
        same = w == end
        mask = mask | (same & (same.sum() > 1))
    return mask


def descent(
    backend: Backend,
    problem: BilevelProblem,
    inputs: Inputs[P, H],
    at: Callable[[P, H], Inputs[P, H]],
    to_minimum: float,
) -> float:
    """Return `Held.descent`. Steps that rounding hides do not count.

    Args:
        at: see `Backend.isolated`.
        to_minimum: the distance of the minimum along −∂L/∂w by the curvature, which may be infinite. Along a tenth of
            it, a smooth L decreases by 0.95 of the prediction.
    """
    start = at(inputs.params, inputs.hparams)
    space = backend.space(start.params)
    params, hparams = space.copy(start.params), backend.space(start.hparams).copy(start.hparams)
    host = backend.to_host
    value, grad = backend.run(_value, problem, start)
    value, slope = float(host(value)), float(host(space.norm(grad)))
    typical = float(host(space.norm(params))) or space.size**0.5
    best = float("nan")
    for step in min(LONGEST * typical, to_minimum) * STEPS:
        if not slope * step > 100 * space.eps * abs(value):
            break
        moved = float(host(backend.run(_value, problem, at(space.axpy(-step / slope, grad, params), hparams))[0]))
        if isfinite(moved):
            best = float(np.fmax(best, (value - moved) / (slope * step)))
    return best


def _value(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> tuple[Array, P]:
    value, grad = problem.value_and_residual(backend, inputs.params, inputs.hparams, inputs.inner_args)
    assert value is not None
    return value, grad

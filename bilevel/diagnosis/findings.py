"""Findings: the errors of a hypergradient."""

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

from bilevel.diagnosis.agreement import Agreement
from bilevel.diagnosis.formatting import percent
from bilevel.diagnosis.measurements import Measured
from bilevel.results import Status

AWAY = 0.01  # relative distance from the minimum with hypergradient errors of ten per cent and more in experiments

GRAD_CAUSES = (
    "The gradient is not the derivative of the objective. Check whether the graph from params to the loss is cut "
    "(detach(), .data, stop_gradient, a conversion to numbers, torch.autograd.grad without create_graph=True, "
    "checkpoint(use_reentrant=False) under functional_call), whether the formula of grad is wrong, and whether a state "
    "outside the arguments changes with each evaluation (spectral_norm in train mode: call eval())."
)
HVP_CAUSES = (
    "An operation has a correct first and a wrong second derivative. In PyTorch: torch.autograd.grad without "
    "create_graph=True in a step or a loss; an autograd.Function that stores intermediates on ctx (save inputs and "
    "outputs by save_for_backward, and compute backward by differentiable operations); "
    "checkpoint(use_reentrant=False) under functional_call (pass the weights to it as arguments); detach(); "
    "spectral_norm in train mode (call eval()). In JAX: a custom_vjp whose backward pass hides a dependency; "
    "stop_gradient; a loss that is not pure. In NumPy: the formula of hvp."
)
CROSS_CAUSES = (
    "The graph from hparams to ∂L/∂w is cut (detach(), .data, stop_gradient, a conversion to numbers), or the formula "
    "of cross_vjp is wrong (a sign, a factor, a transpose)."
)
OUTER_CAUSES = "The graph of the outer loss is cut (detach(), .data, stop_gradient), or the formula of grad is wrong."
CAUSES = {"inner grad": GRAD_CAUSES, "inner hvp": HVP_CAUSES, "inner cross_vjp": CROSS_CAUSES}


class Finding(NamedTuple):
    """An error of a hypergradient.

    Attributes:
        name: "not finite", "not repeatable", "wrong derivative", "not symmetric", "not solved", "solve failed" or
            "residual".
        what: a description of the error.
        way_out: a remedy; "" if ``what`` contains it.
    """

    name: str
    what: str
    way_out: str


def findings(m: Measured) -> Iterator[Finding]:
    """Yield the findings, the most serious first."""
    numbers = (m.grad_norm, m.value, 0.0 if m.curvature == "equation" else m.eigenvalues.largest)
    if m.info.status == Status.NON_FINITE or not all(map(isfinite, numbers)):
        yield Finding("not finite", _failure(m, Status.NON_FINITE), "")
        return
    if not m.repeatable:
        yield _not_repeatable(m)
    wrong = [a for a in m.derivatives.of if a.wrong]
    yield from (Finding("wrong derivative", a.sentence(), _causes(m, a, wrong)) for a in wrong)
    if m.asymmetry > _rounding(m) and not any(a.name == "inner hvp" and not a.unclear for a in m.derivatives.of):
        yield Finding(
            "not symmetric",
            f"Hessian-vector products are not symmetric: u·Hv and v·Hu are {percent(m.asymmetry)} apart.",
            "Autocast, half precision or a wrong derivative may be the cause." if m.repeatable else "",
        )
    # The gradient of a random loss does not vanish, and a method that differentiates steps needs no minimum.
    if m.repeatable and not m.method.differentiates_steps and (m.distance > AWAY or abs(m.gain) > AWAY):
        yield _not_solved(m)
    if m.method.failed(m.info.status):
        yield Finding("solve failed", _failure(m, m.info.status), "")
    elif m.repeatable and not m.solved:
        yield Finding(
            "residual",
            f"The linear solve has a relative residual of {percent(m.residual)}: {m.method.summary} stops too early.",
            "If this is not intended, use more terms, or a solver with a tolerance.",
        )


def how_far(m: Measured) -> str:
    """Describe the distance from a solution of the inner problem."""
    if m.curvature == "equation":
        return f"residual has norm {m.grad_norm:.2g}, and the solution is about {percent(m.distance)} of ‖params‖ away"
    away = f"the minimum is at least {percent(m.distance)} of ‖params‖ away"
    return f"gradient has norm {m.grad_norm:.2g}, and {away if isfinite(m.distance) else 'along it L curves down'}"


def _not_repeatable(m: Measured) -> Finding:
    r = m.repetition
    product = percent(max(r.product, r.new_product))
    held = " With a fixed random state, all derivatives are correct, so there is no other error." if m.verified else ""
    return Finding(
        "not repeatable",
        "The inner problem changes with each evaluation: in a second linearization, its gradient changes by "
        f"{percent(r.new_grad)}, a Hessian-vector product by {product} and a cross product by {percent(r.new_cross)}. "
        "So the hypergradient belongs to one random draw.",
        "Dropout or another random operation is active, or a state changes with each evaluation (spectral "
        f"normalisation). Call eval() on the module, or fix the seed inside the loss.{held}",
    )


def _causes(m: Measured, a: Agreement, wrong: list[Agreement]) -> str:
    if not m.repeatable:
        return "Make the losses repeatable, then run bl.diagnose again."
    if a.name == "inner hvp" and wrong[0].name == "inner grad":
        return "The wrong gradient may be the only cause."
    return CAUSES.get(a.name, OUTER_CAUSES)


def _not_solved(m: Measured) -> Finding:
    gain = f", and solving it would change F by about {percent(m.gain)}" if m.gain else ""
    if m.curvature == "equation":
        fails, there, way_out = "solve the equation", "solution", "Iterate further"
    else:
        fails, there, way_out = "minimize the inner objective", "minimum", "Train the inner problem further"
    return Finding(
        "not solved",
        f"params does not {fails}: its {how_far(m)}{gain}. The formula of a hypergradient holds at a {there}. At this "
        "distance, its error can be tens of per cent.",
        f'{way_out}, or use solver="unrolled", which needs no {there}.',
    )


def _failure(m: Measured, status: Status) -> str:
    ends = None if m.curvature == "equation" else m.eigenvalues
    info = m.info._replace(status=status)
    return f"{m.method.name}: {m.method.explain(info, m.curvature != 'equation', ends)}"


def _rounding(m: Measured) -> float:
    """Return the largest asymmetry that rounding or finite differences explain."""
    return m.eps**0.25 if m.curvature == "finite-differences" else m.eps**0.5

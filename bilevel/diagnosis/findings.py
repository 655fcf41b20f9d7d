"""What keeps a hypergradient from being right."""

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

from bilevel.diagnosis.agreement import Agreement
from bilevel.diagnosis.formatting import percent
from bilevel.diagnosis.measurements import Measured
from bilevel.results import Status

AWAY = 0.01  # of the weights, from the minimum: hypergradients were found to be off by ten per cent and more there

GRAD_CAUSES = (
    "The objective does not follow its gradient. Either the way from params to the loss is cut (detach(), .data, "
    "stop_gradient, a conversion to numbers, torch.autograd.grad without create_graph=True, "
    "checkpoint(use_reentrant=False) under functional_call), or the formula of grad is wrong, or a state outside the "
    "arguments moves with each evaluation (spectral_norm in train mode: eval())."
)
HVP_CAUSES = (
    "An operation has a right first and a wrong second derivative. In PyTorch: torch.autograd.grad without "
    "create_graph=True in a step or a loss; an autograd.Function that keeps intermediates on ctx (save inputs and "
    "outputs by save_for_backward, and compute backward by differentiable operations); "
    "checkpoint(use_reentrant=False) under functional_call (hand the weights to it as arguments); detach(); "
    "spectral_norm in train mode (call eval()). In JAX: a custom_vjp whose backward pass hides what it depends on; "
    "stop_gradient; a loss that is not pure. In NumPy: the formula of hvp."
)
CROSS_CAUSES = (
    "The way from hparams to ∂L/∂w is cut somewhere (detach(), .data, stop_gradient, a conversion to numbers), or the "
    "formula of cross_vjp is wrong (a sign, a factor, a transpose)."
)
OUTER_CAUSES = "The way to the outer loss is cut (detach(), .data, stop_gradient), or the formula of its grad is wrong."
CAUSES = {"inner grad": GRAD_CAUSES, "inner hvp": HVP_CAUSES, "inner cross_vjp": CROSS_CAUSES}


class Finding(NamedTuple):
    """Something that keeps a hypergradient from being right.

    Attributes:
        name: "not finite", "not repeatable", "wrong derivative", "not symmetric", "not solved", "solve failed" or
            "residual".
        what: what was found.
        way_out: what to do about it; "" where ``what`` says it.
    """

    name: str
    what: str
    way_out: str


def findings(m: Measured) -> Iterator[Finding]:
    """Yield what was found, the gravest first."""
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
            "Autocast or half precision may do that, or a wrong derivative." if m.repeatable else "",
        )
    # The gradient of one draw vanishes nowhere, and a method that differentiates the training needs no minimum.
    if m.repeatable and not m.method.differentiates_steps and (m.distance > AWAY or abs(m.gain) > AWAY):
        yield _not_solved(m)
    if m.info.status != Status.CONVERGED:
        yield Finding("solve failed", _failure(m, m.info.status), "")
    elif m.repeatable and not m.solved:
        yield Finding(
            "residual",
            f"v leaves {percent(m.residual)} of the right-hand side unsolved: {m.method.summary} stops before.",
            "That may be intended; else take more terms, or a solver with a tolerance.",
        )


def how_far(m: Measured) -> str:
    """Say how far the inner problem is from being solved."""
    if m.curvature == "equation":
        return f"residual has norm {m.grad_norm:.2g}, and the solution is some {percent(m.distance)} of ‖params‖ away"
    away = f"the minimum is {percent(m.distance)} of ‖params‖ or more away"
    return f"gradient has norm {m.grad_norm:.2g}, and {away if isfinite(m.distance) else 'along it L curves down'}"


def _not_repeatable(m: Measured) -> Finding:
    r = m.repetition
    product = percent(max(r.product, r.new_product))
    held = " With the random state held still all derivatives are right, so this is all." if m.verified else ""
    return Finding(
        "not repeatable",
        f"The inner problem is another one each time: linearized anew, its gradient changes by {percent(r.new_grad)}, "
        f"a Hessian-vector product by {product} and a cross product by {percent(r.new_cross)}. So a hypergradient is "
        "that of one draw.",
        "Dropout or another random operation is on, or a state moves with each evaluation (spectral normalisation). "
        f"Call eval() on the module, or fix the seed inside the loss.{held}",
    )


def _causes(m: Measured, a: Agreement, wrong: list[Agreement]) -> str:
    if not m.repeatable:
        return "Make the losses repeatable, then look again."
    if a.name == "inner hvp" and wrong[0].name == "inner grad":
        return "The wrong gradient may be all that is behind it."
    return CAUSES.get(a.name, OUTER_CAUSES)


def _not_solved(m: Measured) -> Finding:
    gain = f", and solving it would change F by about {percent(m.gain)}" if m.gain else ""
    if m.curvature == "equation":
        fails, there, way_out = "solve the equation", "solution", "Iterate further"
    else:
        fails, there, way_out = "minimize the inner objective", "minimum", "Train the inner problem further"
    return Finding(
        "not solved",
        f"params does not {fails}: its {how_far(m)}{gain}. The formula of a hypergradient holds at a {there}, and is "
        "off by tens of per cent this far away.",
        f'{way_out}, or use solver="unrolled", which needs no {there}.',
    )


def _failure(m: Measured, status: Status) -> str:
    ends = None if m.curvature == "equation" else m.eigenvalues
    info = m.info._replace(status=status)
    return f"{m.method.name}: {m.method.explain(info, m.curvature != 'equation', ends)}"


def _rounding(m: Measured) -> float:
    """Return the asymmetry that arithmetic can cause; of products known to be right, all is."""
    return m.eps**0.25 if m.curvature == "finite-differences" else m.eps**0.5

"""Findings: the errors of a hypergradient."""

from collections.abc import Iterator
from math import isfinite

from bilevel.diagnosis.agreement import Agreement
from bilevel.diagnosis.finding import Finding
from bilevel.diagnosis.formatting import percent
from bilevel.diagnosis.influence import without_curvature, without_influence
from bilevel.diagnosis.measurements import Measured
from bilevel.messages import listed
from bilevel.results import Status

GRAD_CAUSES = (
    "The gradient is not the derivative of the objective. Check whether the graph from params to the loss is cut "
    "(detach(), .data, stop_gradient, a conversion to numbers, torch.autograd.grad without create_graph=True, "
    "checkpoint(use_reentrant=False) under functional_call), whether the formula of grad is wrong, and whether a state "
    "outside the arguments changes with each evaluation (spectral_norm in train mode: call eval(); SpectralNorm of "
    "Flax: update_stats=False)."
)
HVP_CAUSES = (
    "An operation has a correct first and a wrong second derivative. In PyTorch: torch.autograd.grad without "
    "create_graph=True in a step or a loss; an autograd.Function that stores intermediates on ctx (save inputs and "
    "outputs by save_for_backward, and compute backward by differentiable operations); "
    "checkpoint(use_reentrant=False) under functional_call (pass the weights to it as arguments); detach(); "
    "spectral_norm in train mode (call eval()). In JAX: a custom_vjp whose backward pass hides a dependency; "
    "stop_gradient; SpectralNorm of Flax (update_stats=False); a loss that is not pure. In NumPy: the formula of hvp. "
    "In all: a function with a special case at this very point (the abs of a complex zero; in JAX 0.10, hypot or "
    "betaln of equal arguments, and i0 at zero)."
)
CROSS_CAUSES = (
    "The graph from hparams to ∂L/∂w is cut (detach(), .data, stop_gradient, a conversion to numbers), or the formula "
    "of cross_vjp is wrong (a sign, a factor, a transpose)."
)
OUTER_CAUSES = "The graph of the outer loss is cut (detach(), .data, stop_gradient), or the formula of grad is wrong."
CAUSES = {"inner grad": GRAD_CAUSES, "inner hvp": HVP_CAUSES, "inner cross_vjp": CROSS_CAUSES}


def findings(m: Measured) -> Iterator[Finding]:
    """Yield the findings, the most serious first."""
    equation = m.is_equation
    if m.not_finite:
        yield Finding("not finite", str(m.not_finite), m.not_finite.way_out)
        return
    if m.info.status == Status.NON_FINITE:
        yield Finding("not finite", _failure(m), "")
        return
    if m.written:
        yield _writes(m)
    if not m.repeatable:
        yield _not_repeatable(m)
    elif m.derivatives.changed:
        yield _other_arrays(m)
    if m.kinks:
        yield _at_kink(m)
    wrong = [a for a in m.derivatives.of if a.wrong and not (m.kinks and a.source == "inner grad")]
    yield from (Finding("wrong derivative", a.sentence(), _causes(m, a, wrong)) for a in wrong)
    yield from without_influence(m.influence, equation)
    if m.asymmetry > _rounding(m) and not any(a.name == "inner hvp" and not a.unclear for a in m.derivatives.of):
        yield Finding(
            "not symmetric",
            f"Hessian-vector products are not symmetric: u·Hv and v·Hu are {percent(m.asymmetry)} apart.",
            "Autocast, half precision or a wrong derivative may be the cause." if m.repeatable else "",
        )
    products_wrong = any(a.name == "inner hvp" for a in wrong)
    flat = [] if products_wrong else without_curvature(m.unsolvable, equation, bool(m.info.damping))
    yield from flat
    kinks = m.held.findings(m.grad_norm) if m.is_away and not any(a.name == "inner grad" for a in wrong) else []
    yield from kinks
    if m.is_away and not kinks:
        yield _not_solved(m)
    if m.method.failed(m.info.status):
        reason = "Rows of zeros make the system singular" if flat else "The formula does not hold there"
        known = f"{m.method.name} ended with {m.info.status.name}. {reason}, so another solver does not help."
        yield Finding("solve failed", known if flat or kinks else _failure(m), "")
    elif m.damping_found:
        yield Finding(
            "negative curvature",
            "The inner problem curves down at params, or is nearly flat, in some directions. So params is no clear "
            f"minimum. {m.method.summary} added a damping of {m.info.damping:.2g}. The hypergradient is an "
            f"approximation. Its sensitivity ‖∂F/∂w‖·‖params‖ is {m.sensitivity:.2g}: with a cross-entropy as F, "
            "hypergradients of networks were most often right below 4 and wrong above 8 (docs/which-method.md).",
            "Train the inner problem further, or use the Gauss-Newton matrix (bl.Problem.from_model) or "
            'solver="unrolled".',
        )
    elif m.repeatable and not m.solved and not flat:
        yield Finding(
            "residual",
            f"The linear solve has a relative residual of {percent(m.residual)}: {m.method.summary} stops too early.",
            "If this is not intended, use more terms, or a solver with a tolerance.",
        )


def how_far(m: Measured) -> str:
    """Describe the distance from a solution of the inner problem."""
    away = f"{percent(m.distance)} of ‖params‖ away" if m.params_norm else f"{m.step:.2g} away (params is zero)"
    if m.is_equation:
        return f"residual has norm {m.grad_norm:.2g}, and the solution is about {away}"
    if isfinite(m.step):
        return f"gradient has norm {m.grad_norm:.2g}, and the minimum is at least {away}"
    if m.not_finite:
        return f"gradient has norm {m.grad_norm:.2g}"
    curves = "curves down" if m.grad_curvature < 0 else "does not curve"
    return f"gradient has norm {m.grad_norm:.2g}, and along it L {curves}"


def _writes(m: Measured) -> Finding:
    return Finding(
        "writes",
        f"A loss writes to {listed(m.written)}. So its derivatives belong to other values than the given ones, and "
        "autograd does not see the change. bl.diagnose has restored the values.",
        "Common causes are clamp_ in a forward pass, torch.nn.Embedding(max_norm=...), and NumPy functions with out=. "
        "Compute new values instead (clamp without the underscore), or change the weights after the optimizer's step.",
    )


def _at_kink(m: Measured) -> Finding:
    return Finding(
        "at kink",
        f"{listed(m.kinks)} {'is' if len(m.kinks) == 1 else 'are'} at a kink of the proximal step or of an inequality, "
        "to rounding: it is just about to leave or to reach a kink, a bound or a constraint. The solution map has no "
        "derivative there.",
        "The hypergradient belongs to one side of the kink. Change the hyperparameters a little, or solve the inner "
        "problem more accurately.",
    )


def _other_arrays(m: Measured) -> Finding:
    return Finding(
        "other arrays",
        f"{listed(m.derivatives.changed)} {'changes' if len(m.derivatives.changed) == 1 else 'change'} if params and "
        "hparams are replaced by copies: a loss computes with other arrays than its arguments, for example with values "
        "that were computed from them before the call.",
        "Compute everything from the arguments, inside the losses. In PyTorch, run modules with params by "
        "torch.func.functional_call.",
    )


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
    if m.written:
        return f"The writing to {listed(m.written)} may be the only cause."
    if a.name == "inner hvp" and wrong[0].name == "inner grad":
        return "The wrong gradient may be the only cause."
    return CAUSES.get(a.name, OUTER_CAUSES)


def _not_solved(m: Measured) -> Finding:
    gain = f", and solving it would change F by about {percent(m.gain)}" if m.gain else ""
    if m.is_equation:
        fails, there, way_out, more = "solve the equation", "solution", "Iterate further", ""
    else:
        fails, there, way_out = "minimize the inner objective", "minimum", "Train the inner problem further"
        more = " (If a bound or a constraint holds params, use bl.Projected: docs/problems.md.)"
    return Finding(
        "not solved",
        f"params does not {fails}: its {how_far(m)}{gain}. The formula of a hypergradient holds at a {there}. At this "
        "distance, its error can be tens of per cent.",
        f'{way_out}, or use solver="unrolled", which needs no {there}.{more}',
    )


def _failure(m: Measured) -> str:
    ends = None if m.curvature == "equation" else m.eigenvalues
    return f"{m.method.name}: {m.method.explain(m.info, m.curvature != 'equation', ends)}"


def _rounding(m: Measured) -> float:
    """Return the largest asymmetry that rounding or finite differences explain."""
    return m.eps**0.25 if m.curvature == "finite-differences" else m.eps**0.5

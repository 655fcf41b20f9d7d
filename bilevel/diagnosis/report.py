"""The report of `bl.diagnose`."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, isnan

from bilevel.diagnosis.finding import Finding
from bilevel.diagnosis.findings import findings, how_far
from bilevel.diagnosis.formatting import first_line
from bilevel.diagnosis.layout import LABEL, WIDTH, Line, written
from bilevel.diagnosis.measurements import Measured
from bilevel.diagnosis.suggestions import suggestions

UNTRUSTED = {"not finite", "other arrays", "wrong derivative", "not symmetric", "no curvature", "kink", "at kink"}
"""Findings after which other solvers do not help."""


@dataclass(frozen=True)
class Diagnosis(Measured):
    """The report of `bl.diagnose`, for ``print``. `Measured` lists its numbers."""

    @property
    def ok(self) -> bool:
        """Whether there are no findings. ``unchecked`` has the names of derivatives without a comparison."""
        return not self.findings

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings, the most serious first."""
        return tuple(findings(self))

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Solver, damping and step size to use, with reasons. There are none if no solver helps."""
        return () if {f.name for f in self.findings} & UNTRUSTED else tuple(suggestions(self))

    def __str__(self) -> str:
        further = [f"Suggestion: {suggestion}" for suggestion in self.suggestions]
        if self.unchecked:
            further.insert(0, f"Not checked: {', '.join(self.unchecked)}. {_why_unchecked(self)}")
        return written("bl.diagnose", self.findings, _lines(self), further)


def _lines(m: Measured) -> Iterator[Line]:
    yield {"not solved", "kink", "at kink", "not finite"}, "inner problem", how_far(m)
    yield {"no curvature", "negative curvature"}, "curvature", _curvature(m)
    r = m.repetition
    new = f"a product {r.new_product:.1g}, the gradient {r.new_grad:.1g}, the cross product {r.new_cross:.1g}"
    yield {"not repeatable"}, "repetition", f"changes: the same product {r.product:.1g}; linearized again, {new}"
    if m.curvature != "equation":
        yield {"not symmetric"}, "asymmetry", f"{m.asymmetry:.1g}"
    yield {"wrong derivative", "other arrays", "no influence"}, "differences", _differences(m)
    left = f", true residual {m.residual:.2g} of the right-hand side" if isfinite(m.residual) else ""
    plain = f" ({m.undamped_residual:.2g} without the damping)" if m.undamped_residual != m.residual and left else ""
    solve = f"{m.method.summary}: {m.info.status.name} after {m.info.steps} steps{left}{plain}"
    yield {"solve failed", "residual", "not finite"}, "solve", solve


def _curvature(m: Measured) -> str:
    if m.curvature == "equation":
        return "an equation, whose Jacobian is not symmetric"
    smallest, largest, below, above = m.eigenvalues
    if isnan(smallest):
        return "nan"
    sign = "some are negative" if smallest < 0 else "none is negative"
    what = "" if m.curvature == "hessian" else f" of {m.curvature} products"
    what = {"proximal": " on the support", "constrained": " of the KKT matrix"}.get(m.curvature, what)
    return f"eigenvalues{what} from {smallest:.3g} (± {below:.1g}) to {largest:.4g} (± {above:.1g}): {sign}"


def _differences(m: Measured) -> str:
    derivatives = m.derivatives
    if not derivatives.of:
        return f"none taken: {first_line(derivatives.obstacle, WIDTH)}"
    dtype = "float64" if derivatives.eps < 1e-15 else f"a dtype of epsilon {derivatives.eps:.1g}"
    why = f" ({first_line(derivatives.obstacle, WIDTH)})" if derivatives.obstacle else ""
    each = [f"{a.name} {a.error:.0e}{' WRONG' * a.wrong}{' unclear' * a.unclear}" for a in derivatives.of]
    if m.curvature == "gauss-newton":
        each.insert(1, "inner hvp: not a derivative")
    rows = (f"{'':{LABEL + 2}}{', '.join(row)}" for row in (each[:-2], each[-2:]))
    return "\n".join([f"in {dtype}{why}:", *rows])


def _why_unchecked(m: Measured) -> str:
    if m.not_finite:
        return "There are no differences of values that are nan or infinite."
    if not m.repeatable:
        return "Make the losses repeatable, then run bl.diagnose again."
    if m.derivatives.changed:
        return "They do not belong to params and hparams only."
    if not m.derivatives.of:
        return (
            "To be evaluated at other points, the objectives must compute with the params and hparams in their "
            "arguments, or with modules that hold them."
        )
    return (
        "The differences are too noisy: there are kinks at this point (relu of a zero), or the objectives compute in "
        "less than float64 or raise errors in float64."
    )

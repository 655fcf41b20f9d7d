"""The two comparisons of `check_hypergradient`. Each returns a message, or None if all values agree."""

from typing import Any, NamedTuple

import numpy as np

from bilevel.backend import Backend
from bilevel.diagnosis.agreement import compare
from bilevel.hypergradient import hypergradient
from bilevel.linearization import Inputs
from bilevel.methods.method import Method
from bilevel.problems.protocols import BilevelProblem
from bilevel.results import Hypergradient
from bilevel.spaces.array import H, P
from bilevel.testing.dense_reference import exact_hypergradient
from bilevel.testing.difference_reference import directional_derivatives, solutions
from bilevel.testing.directions import directions, index, leaf_slices
from bilevel.testing.host import HostProblem
from bilevel.testing.retraining import Fit
from bilevel.testing.wording import paragraphs, relation, table

ROWS = 20  # the largest number of leaves in a table, the worst first


class Subject(NamedTuple):
    """A hypergradient to be checked, with its problem, point and method."""

    backend: Backend
    problem: BilevelProblem
    inputs: Inputs[Any, Any]
    method: Method
    hg: Hypergradient[Any, Any]
    rtol: float
    atol: float | None
    damping: float
    fit: Fit | None

    @property
    def grad(self) -> np.ndarray:
        """Return dF/dλ, of shape (m,)."""
        return self.backend.to_flat(self.hg.grad)

    @property
    def direct(self) -> np.ndarray:
        """Return ∂F/∂λ, of shape (m,)."""
        direct = self.backend.run(_direct, self.problem, self.inputs)
        zeros = self.backend.space(self.inputs.hparams).zeros()
        return self.backend.to_flat(zeros if direct is None else direct)

    def absolute(self, grad: np.ndarray) -> float:
        """Return atol, by default rtol/100 of the larger of ‖grad‖ and ‖∂F/∂λ‖."""
        whole = max(float(np.linalg.norm(grad)), float(np.linalg.norm(self.direct)))
        return self.rtol * whole / 100 if self.atol is None else self.atol

    def heading(self, reference: str, atol: float) -> str:
        """Return the first line."""
        tolerances = f"rtol={self.rtol:.2g}, atol={atol:.2g}"
        return f"the hypergradient by {self.method.summary} differs from {reference} ({tolerances})."

    def ending(self) -> str:
        """Return a description of the solve, with the norm of the inner gradient at params."""
        info = self.hg.info
        inner_grad = self.backend.to_flat(self.backend.run(_inner_grad, self.problem, self.inputs))
        return (
            f"The solve: {info.status.name} after {info.steps} steps, residual {info.residual_norm:.2g} of a "
            f"right-hand side of {info.rhs_norm:.2g}. The inner gradient at params: norm "
            f"{np.linalg.norm(inner_grad):.2g}."
        )


def against_exact(subject: Subject) -> str | None:
    """Compare with the result of a dense solve, leaf by leaf."""
    backend, inputs = subject.backend, subject.inputs
    reference = exact_hypergradient(subject.problem, **inputs._asdict(), damping=subject.damping, backend=backend)
    tested, expected = subject.grad, backend.to_flat(reference.grad)
    atol = subject.absolute(expected)
    rows, wrong = [], np.zeros(len(tested), dtype=bool)
    for path, shape, part in leaf_slices(backend, inputs.hparams):
        t, r = tested[part], expected[part]
        error, norms = np.linalg.norm(t - r), (np.linalg.norm(t), np.linalg.norm(r))
        excess = ratio(error, atol + subject.rtol * norms[1]) if error else 0.0
        wrong[part] = not excess <= 1
        if len(t):
            worst = int(np.abs(t - r).argmax())
            entry = f"{index(worst, shape)}: {t[worst]:.4g}, exact {r[worst]:.4g}".lstrip(": ")
            cosine = f"{t @ r / norms[0] / norms[1]:.4f}" if all(norms) else "-"
            cells = (path, *(f"{norm:.5g}" for norm in norms), f"{ratio(error, norms[1]):.2g}", cosine, entry)
            rows.append((excess, wrong[part][0], cells))
    if not wrong.any():
        return None
    worst_first = sorted(rows, key=lambda row: -np.nan_to_num(row[0], nan=np.inf))[:ROWS]
    titles = ("leaf", "‖hypergradient‖", "‖exact‖", "relative error", "cosine", "worst entry")
    return paragraphs(
        subject.heading("the exact one", atol),
        table(titles, [(bad, cells) for _, bad, cells in worst_first]),
        _cause(subject, tested[wrong], expected[wrong], subject.direct[wrong]),
        subject.ending(),
    )


def against_differences(subject: Subject, seed: int) -> str | None:
    """Compare with differences of the re-solved or retrained problem, along directions."""
    host = HostProblem(subject.backend, subject.problem, subject.inputs, subject.damping)
    contradictions = [a for a in compare(subject.backend, subject.problem, subject.inputs).of if a.wrong]
    if contradictions and contradictions[0].name == "inner grad" and subject.fit is None:
        return paragraphs(
            f"{contradictions[0].sentence()} It cannot solve the inner problem, so there is no reference."
        )

    named = list(directions(subject.backend, subject.inputs.hparams, subject.grad, np.random.default_rng(seed)))
    ds = np.stack([d for _, d in named])
    solver = solutions(host, subject.fit)
    expected, noise = np.array(directional_derivatives(solver, ds)).T
    atol = subject.absolute(subject.grad)

    def judge(grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return masks of the directions that are wrong, and of those with little noise."""
        tested = ds @ grad
        plain = atol + subject.rtol * np.maximum(np.linalg.norm(ds * grad, axis=1), np.abs(expected))
        wrong = ~(np.abs(tested - expected) <= plain + 2 * noise)
        return wrong, noise <= np.maximum(plain, 0.1 * np.maximum(np.abs(tested), np.abs(expected)))

    tested, (wrong, telling) = ds @ subject.grad, judge(subject.grad)
    if not wrong.any() and (telling.any() or not tested.any()):
        return None
    rows = [
        (bad, (name, f"{t:.6g}", f"{r:.6g}", f"{ratio(t, r):.4f}", f"{e:.1g}"))
        for (name, _), t, r, e, bad in zip(named, tested, expected, noise, wrong, strict=True)
    ]
    said = [table(("direction", "hypergradient", "differences", "ratio", "noise"), rows), subject.ending()]
    if not wrong.any():
        remedy = "use float64" if subject.fit is None else "train more exactly, with a fixed seed, in float64"
        return paragraphs(f"the finite differences are too noisy for a comparison: {remedy}.", *said)

    w = solver.w
    away = np.linalg.norm(w - host.w) / (np.linalg.norm(w) or 1.0)
    solved, minimizer, what = (
        ("re-solved", "minimizer", "the minimizer of the inner objective")
        if subject.fit is None
        else ("retrained", "params", "the result of fit")
    )
    said[-1] += f" The relative distance of params to the {solved} {minimizer} is {away:.2g}."
    if not judge(_grad_at(subject, host, w))[0].any():
        causes = [
            f"params is not {what}: at the {solved} {minimizer}, the hypergradient agrees. Train the inner problem "
            'further, or compare with reference="exact".'
        ]
    else:
        inside_leaf = np.array([not name.startswith("random over") for name, _ in named])
        shown = wrong & inside_leaf if (wrong & inside_leaf).any() else wrong
        direct = np.array(directional_derivatives(solver, ds, follow=False))[:, 0]
        if subject.fit is not None and (np.abs(expected - direct) <= noise).all():
            causes = ["fit returns the same params for other hyperparameters. It must train with the given hparams."]
        else:
            causes = [_cause(subject, tested[shown], expected[shown], direct[shown], noise[shown])]
        causes.extend(a.sentence() for a in contradictions)
    heading = subject.heading(f"finite differences of the {solved} problem", atol)
    return paragraphs(heading, said[0], *causes, said[1])


def ratio(a: Any, b: Any) -> float:
    """Return a / b. If b is zero, return infinity, or nan for 0 / 0."""
    return float(a / b) if b else float("inf" if a else "nan")


def _cause(subject: Subject, tested: Any, expected: Any, direct: Any, noise: Any = 0.0) -> str:
    info = subject.hg.info
    damping, automatic = float(info.damping), isinstance(subject.method.damping, str)
    other_damping = damping != subject.damping and subject.fit is None
    if other_damping and automatic:
        return (
            f"The solver found a damping of {damping:.2g}, but the reference has {subject.damping:.2g}. To check the "
            f"damped solve, pass damping={damping:.3g} to the solver and to the check."
        )
    sentence = relation(tested, expected, direct, noise)
    if sentence is not None:
        return sentence
    if other_damping:
        return (
            f"The solver has a damping of {damping:.2g}, but the reference has {subject.damping:.2g}. Pass "
            f"damping={damping:.2g} to check the damped solve."
        )
    if not np.isfinite(subject.grad).all():
        return "The hypergradient has entries that are nan or infinite."
    if subject.problem.kind == "gauss-newton":
        return (
            "Gauss-Newton leaves out part of the Hessian, which explains a difference. To allow for it, pass rtol=. "
            'For the full Hessian, use bl.Problem.from_model(..., curvature="hessian").'
        )
    if subject.method.failed(info.status):
        return f"The solve failed ({info.status.name}). The message of bl.hypergradient has advice."
    if not info.residual_norm <= subject.rtol * info.rhs_norm:
        return "The solve is far from complete, which explains a difference. To allow for it, pass rtol=."
    if subject.method.rtol and np.linalg.norm(tested - expected) < 0.1 * np.linalg.norm(expected):
        return "They are close: the condition number multiplies the residual, so lower the solver's rtol."
    return "They differ neither by the sign, nor by a factor, nor by the direct term."


def _grad_at(subject: Subject, host: HostProblem[Any, Any], w: np.ndarray) -> np.ndarray:
    inputs, backend = subject.inputs._replace(params=host.at(w, host.lam).params)._asdict(), subject.backend
    hg = hypergradient(subject.problem, **inputs, solver=subject.method, backend=backend, on_failure="ignore")
    return backend.to_flat(hg.grad)


def _inner_grad(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> P:
    return problem.value_and_residual(backend, inputs.params, inputs.hparams, inputs.inner_args)[1]


def _direct(backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H]) -> H | None:
    return backend.outer(problem.outer, inputs.params, inputs.hparams, inputs.outer_args).grad_hparams

"""Check a hypergradient."""

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.diagnosis.agreement import compare, elsewhere, nothing
from bilevel.diagnosis.best_precision import in_best_precision
from bilevel.diagnosis.influence import Influence, has_zeros, influence
from bilevel.diagnosis.kinks import Held, descent, evidence
from bilevel.diagnosis.look import look, look_again
from bilevel.diagnosis.measurements import Repetition
from bilevel.diagnosis.report import Diagnosis
from bilevel.errors import DependenceWarning
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.inspection.entries import Arrays, Entries, copied, entries, named
from bilevel.inspection.not_finite import find_in_problem
from bilevel.linearization import Inputs
from bilevel.methods.implicit import as_method
from bilevel.methods.method import Method
from bilevel.operators.lanczos import Spectrum
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args, Array, H, P
from bilevel.validation import check_inputs, check_problem, find_backend, takes_problem, wrong_calls_named


@takes_problem
def diagnose(
    problem: BilevelProblem,
    params: object,
    hparams: object,
    *,
    inner_args: Args | list[Args] = (),
    outer_args: Args = (),
    solver: SolverSpec = "cg",
    backend: Backend | str | None = None,
) -> Diagnosis:
    """Return a report on a hypergradient, for printing: its errors, their causes, and remedies.

    The report checks whether the inner problem is solved and whether the losses are repeatable. It estimates the
    curvature and the symmetry of the Hessian-vector products. It compares each derivative with differences, and
    computes the true residual of the solver. So it finds errors without a symptom: ``detach()`` in a forward pass,
    custom functions with a wrong second derivative, active dropout, or a mistake in a formula. It names the leaves that
    are nan, that have no influence on the inner problem, or that a kink or a bound holds.

    Differences are in float64, on copies of all arrays and modules, if the objectives support it. Otherwise they are in
    the dtype of the inputs, and may be too noisy. The report has the dtype. A small batch of the data is enough. The
    report takes about 30 Hessian-vector products (20 of them for the curvature), the solve, and 15 gradients if all is
    well, at most 50. In JAX, its seven functions compile once per problem, and up to three more if there are findings.

    The call changes neither params, ``.grad``, modules and their buffers, nor the random states of the framework, NumPy
    and Python. If a loss writes to params or hparams, they get their values back. Losses may change other states, such
    as a ``torch.Generator``. For losses without arguments, as in a PyTorch loop, use `bilevel_torch.diagnose`.

    Args:
        problem, params, hparams, inner_args, outer_args, solver, backend: as in `bl.hypergradient`. With a list of
            batches, all measurements use the first batch, and there is no residual.

    Returns:
        A `Diagnosis`. ``ok`` is true if there are no ``findings``. The other fields are ``suggestions`` and numbers.

    Raises:
        TypeError, ValueError, RuntimeError: as in `bl.hypergradient`, and under ``jit``.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> report = bl.diagnose(problem, np.array([1.0, 0.25]), np.ones(2))
    >>> report.ok, report.eigenvalues.largest
    (True, 4.0)
    >>> far = bl.diagnose(problem, np.array([3.0, 3.0]), np.ones(2))
    >>> [finding.name for finding in far.findings]
    ['not solved']
    """
    check_problem(problem)
    method = as_method(copy(get_solver(solver)))  # a WarmStart must not change
    found = find_backend(backend, params, hparams)
    batches = check_inputs(found, params, hparams, inner_args, outer_args)
    if found.to_host(found.space(params).max_abs(params)) is None:
        raise TypeError("bl.diagnose reads numbers: call it outside jit, grad and vmap.")
    with _random_state_kept(), wrong_calls_named(problem, batches[0], outer_args):
        return _diagnose(found, method, problem, Inputs(params, hparams, batches[0], outer_args), batches)


def _diagnose(
    backend: Backend, method: Method, problem: BilevelProblem, inputs: Inputs[P, H], batches: list[Args]
) -> Diagnosis:
    def host(scalars: Iterable[Array]) -> list[float]:
        return [float(backend.to_host(x)) for x in scalars]

    params, hparams, inner_args, outer_args = inputs
    before = _arrays(backend, inputs)
    with backend.isolated(inputs, False):
        first, kinks, numbers = backend.run(look, problem, inputs)
        grad_norm, grad_curvature, params_norm, asymmetry, *ends = host(numbers)
        data: dict[str, Any] = {"inner_args": batches if len(batches) > 1 else inner_args, "outer_args": outer_args}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DependenceWarning)  # the report has a finding about it
            hg = hypergradient(problem, params, hparams, **data, solver=method, backend=backend, on_failure="ignore")
        again = backend.run(look_again, problem, inputs, hg.adjoint, first, hg.info.damping)
        inner, value, change, left, undamped, *changes = host(again)
        here = entries(backend, first)
        wrong = find_in_problem(backend, problem, inputs, inner, value, here)
        after = _arrays(backend, inputs)
    if method.differentiates_steps or len(batches) > 1:
        change = left = undamped = float("nan")
    measured = Diagnosis(
        curvature=problem.kind,
        method=method,
        info=hg.info,
        residual=left,
        undamped_residual=undamped,
        value=value,
        change=change,
        grad_norm=grad_norm,
        grad_curvature=grad_curvature,
        params_norm=params_norm,
        params_size=backend.space(params).size,
        eigenvalues=Spectrum(*ends),
        asymmetry=asymmetry,
        repetition=Repetition(*changes),
        derivatives=nothing(problem, "nan or inf"),
        not_finite=wrong,
        influence=Influence(),
        held=Held(),
        kinks=named(lambda mark: mark > 0, copied(backend, kinks, "params")),
        written=tuple(path for path, x in before.items() if x.tobytes() != after[path].tobytes()),
        eps=max(backend.space(params).eps, backend.space(hparams).eps),
    )
    return measured if wrong else _look_elsewhere(measured, backend, problem, inputs, before, here)


def _look_elsewhere(
    m: Diagnosis, backend: Backend, problem: BilevelProblem, inputs: Inputs[P, H], point: Arrays, here: Entries
) -> Diagnosis:
    """Add the measurements at other points."""
    m = replace(m, derivatives=compare(backend, problem, inputs))
    if has_zeros(here) and not m.all_held:
        there, _ = in_best_precision(backend, inputs, lambda at: elsewhere(backend, problem, inputs, at))
        m = replace(m, influence=influence(here, None if there is None else entries(backend, there)))
    if m.is_away and not m.is_equation:
        decrease, _ = in_best_precision(backend, inputs, lambda at: descent(backend, problem, inputs, at, m.step))
        m = replace(m, held=evidence(point, here.grad, here.product, decrease))
    return m


def _arrays(backend: Backend, inputs: Inputs[P, H]) -> Arrays:
    return {**copied(backend, inputs.params, "params"), **copied(backend, inputs.hparams, "hparams")}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random states of Python and NumPy, which losses of any framework may use."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002

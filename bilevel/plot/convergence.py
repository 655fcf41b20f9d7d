"""The residual of a linear solve against its iterations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

from bilevel.backend import Backend
from bilevel.config import get_solver
from bilevel.hypergradient import SolverSpec, hypergradient
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.plot.axes import axes
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = ("maxiter", "terms")  # the option of a solver that limits its iterations


def convergence(
    problem: BilevelProblem,
    params: object,
    hparams: object,
    solvers: Mapping[str, SolverSpec],
    *,
    inner_args: Args | list[Args] = (),
    outer_args: Args = (),
    counts: Sequence[int] = COUNTS,
    backend: Backend | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the residual of each solver, relative to its right-hand side ∂F/∂w, after several numbers of iterations.

    Each point is another solve, which JAX compiles. With the default counts, each solver takes 127 iterations. A solve
    that ends early, because its ``rtol`` is met or it fails, ends the curve. The residual is of the solver's own
    system, with its damping.

    Args:
        problem, params, hparams, inner_args, outer_args, backend: as in `bilevel.hypergradient`.
        solvers: a solver for each label: a name, a mapping, a TOML file or an object. They need an option ``maxiter``
            or ``terms``: "cg", "minres", "bicgstab", "normal-cg", "neumann".
        counts: the numbers of iterations, >= 1 and increasing.
        ax: the axes to draw on. None: new ones.

    Raises:
        TypeError, ValueError: for invalid input, or a solver without such an option; the message names it.
        ModuleNotFoundError: if matplotlib is not installed.

    >>> import numpy as np, bilevel as bl, bilevel.plot
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> ax = bl.plot.convergence(problem, np.zeros(2), np.zeros(2), {"CG": "cg", "Neumann": "neumann"}, counts=[1, 2])
    >>> [line.get_label() for line in ax.lines]
    ['CG', 'Neumann']
    """
    if not isinstance(solvers, Mapping):
        raise TypeError(f'solvers: expected a mapping, such as {{"CG": "cg"}}, got {type(solvers).__name__}.')
    if not solvers:
        raise ValueError('solvers: there is none. Pass a mapping, such as {"CG": "cg"}.')
    _check_counts(counts)
    limited = {label: _limited(label, spec) for label, spec in solvers.items()}
    ax, lines = axes(ax), []
    for label, (solver, length) in limited.items():
        steps, residuals = [], []
        for count in counts:
            hg = hypergradient(
                problem,
                params,
                hparams,
                inner_args=inner_args,
                outer_args=outer_args,
                solver=replace(solver, **{length: count}),
                backend=backend,
                on_failure="ignore",
            )
            relative = hg.info.residual_norm / hg.info.rhs_norm if hg.info.rhs_norm else math.nan
            if steps and (hg.info.steps == steps[-1] or not math.isfinite(relative)):
                break
            if not math.isfinite(relative):
                raise ValueError(
                    f"solvers[{label!r}]: after {count} iterations, the residual is {hg.info.residual_norm}. ∂F/∂w has "
                    f"the norm {hg.info.rhs_norm}. bl.diagnose finds the cause."
                )
            steps.append(hg.info.steps)
            residuals.append(relative)
        lines += ax.plot(steps, residuals, "o-", markersize=4, label=str(label))
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel="residual, relative to ∂F/∂w")
    for text in ax.legend(lines, list(map(str, limited))).get_texts():
        text.set_parse_math(False)
    return ax


def _check_counts(counts: Any) -> None:
    """Raise an error if the numbers of iterations are not positive and increasing."""
    numbers = list(counts) if isinstance(counts, Iterable) else []
    integers = all(isinstance(n, Integral) for n in numbers)
    if not numbers or not integers or any(a >= b for a, b in pairwise([0, *numbers])):
        raise ValueError(f"counts: expected increasing integers >= 1, such as (1, 2, 4), got {counts!r:.60}.")


def _limited(label: str, spec: SolverSpec) -> tuple[Any, str]:
    """Return a solver, and the name of the option that limits its iterations."""
    solver: Any = get_solver(spec)
    for length in LENGTHS:
        if isinstance(solver, LinearSolver) and hasattr(solver, length):
            return solver, length
    raise ValueError(f"solvers[{label!r}]: {type(solver).__name__} has no option maxiter or terms.")

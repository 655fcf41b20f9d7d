"""The spectrum of the Hessian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bilevel.backend import Backend
from bilevel.methods.method import Level
from bilevel.operators.lanczos import spectral_density
from bilevel.options import check_count
from bilevel.plot.axes import axes
from bilevel.problems.protocols import BilevelProblem, has_symmetric_system
from bilevel.spaces.array import Args, Array
from bilevel.validation import check_inputs, check_problem, find_backend, wrong_calls_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINEAR = 1e-4  # of the largest eigenvalue: below it, the scale is linear
DUST = 1e-12  # a smaller weight is rounding


def spectrum(
    problem: BilevelProblem,
    params: object,
    hparams: object,
    *,
    inner_args: Args | list[Args] = (),
    products: int = 40,
    backend: Backend | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the spectral density of the Hessian ∂²L/∂w², estimated by Lanczos' method from one random vector.

    Each line is a Ritz value. Its height is the share of the spectrum near it. The largest and the smallest Ritz value
    are close to eigenvalues. Negative ones are red: CG needs a damping larger than their size.

    Args:
        problem, params, hparams, backend: as in `bilevel.hypergradient`. The outer objective is not evaluated.
        inner_args: further arguments of L. If they are a list of batches, only the first batch is used.
        products: the number of Hessian-vector products, >= 1.
        ax: the axes to draw on. None: new ones.

    Raises:
        TypeError, ValueError: for invalid input, or a nan. Also for a fixed point or a root, whose Jacobian is not
            symmetric.
        ModuleNotFoundError: if matplotlib is not installed.

    >>> import numpy as np, bilevel as bl, bilevel.plot
    >>> problem = bl.problems.quadratic(hessian=np.diag([1.0, 4.0]), coupling=np.eye(2), target=np.ones(2))
    >>> ax = bl.plot.spectrum(problem, np.zeros(2), np.zeros(2))
    >>> [round(float(line[0, 0]), 6) for line in ax.collections[0].get_segments()]
    [1.0, 4.0]
    """
    check_count("products", products)
    check_problem(problem)
    if not has_symmetric_system(problem):
        raise ValueError(
            "spectrum: the Jacobian of a fixed point or a root is not symmetric, as Lanczos' method needs."
        )
    found = find_backend(backend, params, hparams)
    batches = check_inputs(found, params, hparams, inner_args)
    with wrong_calls_named(problem, batches[0], None):
        density = found.run(_density, problem, params, hparams, batches[:1], products)
    nodes, weights = (np.asarray(found.to_numpy(x), float) for x in density)
    if not (np.isfinite(nodes).all() and np.isfinite(weights).all()):
        raise ValueError("spectrum: a Hessian-vector product is not finite. bl.diagnose finds the cause.")
    nodes, weights = nodes[weights > DUST], weights[weights > DUST]

    ax, floor = axes(ax), 0.3 * weights.min(initial=1.0)
    negative = nodes < 0
    ax.vlines(nodes[~negative], floor, weights[~negative], color="C0")
    if negative.any():
        ax.vlines(nodes[negative], floor, weights[negative], color="C3", label="negative")
        ax.legend()
    if (nodes > 0).all():
        ax.set_xscale("log")
    else:
        ax.set_xscale("symlog", linthresh=LINEAR * np.abs(nodes).max() or 1.0)
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="share of the spectrum", yscale="log", ylim=(floor, None))
    return ax


def _density(
    backend: Backend, problem: BilevelProblem, params: object, hparams: object, batches: list[Args], products: int
) -> tuple[Array, Array]:
    level = Level(backend, problem, params, hparams, batches)
    at = level.linearize()
    return spectral_density(level.operator(at), products, project=at.rhs)

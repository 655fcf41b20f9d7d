"""Suggestions for solvers and their options."""

from collections.abc import Iterator
from math import ceil, log

from bilevel.diagnosis.formatting import rounded
from bilevel.diagnosis.measurements import PRODUCTS, Measured
from bilevel.results import Status

CONDITION = 1000.0  # condition number with a suggested damping
STRONG = 0.1  # above this ratio of negative to positive curvature, damping is no remedy
BIAS = "but adds a bias where the curvature is weak"


def suggestions(m: Measured) -> Iterator[str]:
    """Yield suggestions for the solve, with reasons, if the products are correct."""
    if m.curvature == "equation":
        yield _for_an_equation(m)
        return
    smallest, largest, below, above = m.eigenvalues
    if m.all_held:
        yield "all entries of params are held, so there is no system to solve."
        return
    if largest <= 0:
        yield "train the inner problem first: the products show no positive curvature, so there is no minimum near."
        return
    # This damping makes all eigenvalues positive, and bounds the condition number.
    lift = rounded(1.1 * max(0.0, below - smallest) + largest / CONDITION, up=True)
    negative = smallest < 0 or m.info.status == Status.NEGATIVE_CURVATURE
    seen = f"{PRODUCTS} products found no negative eigenvalue, the " if smallest > 0 else "the "
    about = f"{seen}smallest is about {smallest:.2g} ± {below:.1g}"
    if strong := smallest < -STRONG * largest:
        yield (
            f"train the inner problem further. The negative curvature ({smallest:.2g}) is not small against the "
            f'positive curvature ({largest:.2g}): solver="minres" solves such a system, but there is no minimum.'
        )
    if m.solved:
        yield f"keep {m.method.summary}, which took {m.info.steps} steps ({about})."
    elif negative and not strong:
        yield (
            f'solver={{"name": "cg", "damping": {lift:.2g}}}. It makes negative eigenvalues positive ({about}), '
            f'{BIAS}. Or solver="minres", which accepts negative eigenvalues.'
        )
    elif smallest > 0 and m.info.status != Status.MAXITER:
        products = ceil(0.5 * (largest / smallest) ** 0.5 * log(2 / 1e-5))
        yield (
            f'solver={{"name": "cg", "maxiter": {2 * products}}}, which takes about {products} products ({about}). '
            f"If it stagnates or meets negative curvature, damping={lift:.2g} helps, {BIAS}."
        )
    elif not strong:
        yield f'solver={{"name": "cg", "damping": {lift:.2g}}}. It bounds the condition number ({about}), {BIAS}.'
    damping = lift if negative else 0.0
    step = rounded(1 / (largest + above + damping), up=False)
    damped = f" with damping={damping:.2g}" if damping else ""
    yield (
        f"for neumann and unrolled, step_size={step:.2g}{damped}: one over the largest eigenvalue. They diverge above "
        "twice this value."
    )


def _for_an_equation(m: Measured) -> str:
    if m.solved:
        return f"keep {m.method.summary}, which took {m.info.steps} steps."
    return (
        'solver="gmres", or "bicgstab", which stores fewer vectors: the system of a fixed point or a root is not '
        'symmetric. If the step contracts, use {"name": "neumann", "step_size": 1.0}.'
    )

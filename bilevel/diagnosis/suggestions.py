"""Which solver to use, and how."""

from collections.abc import Iterator
from math import ceil, log

from bilevel.diagnosis.formatting import rounded
from bilevel.diagnosis.measurements import PRODUCTS, Measured
from bilevel.results import Status

CONDITION = 1000.0  # that a suggested damping brings about
STRONG = 0.1  # negative curvature against positive, beyond which damping hides the problem
BIAS = "at the price of a bias where the curvature is weak"


def suggestions(m: Measured) -> Iterator[str]:
    """Yield what to do about the solve, with reasons, for products that can be trusted."""
    if m.curvature == "equation":
        yield _for_an_equation(m)
        return
    smallest, largest, below, above = m.eigenvalues
    if largest <= 0:
        yield "train the inner problem first: no positive curvature was seen, so there is no minimum near."
        return
    # What makes the smallest eigenvalue positive for sure, and bounds the condition number.
    lift = rounded(1.1 * max(0.0, below - smallest) + largest / CONDITION, up=True)
    negative = smallest < 0 or m.info.status == Status.NEGATIVE_CURVATURE
    seen = f"{PRODUCTS} products saw no negative eigenvalue, the smallest about" if smallest > 0 else "the smallest is"
    about = f"{seen} {smallest:.2g}, give or take {below:.1g}"
    if strong := smallest < -STRONG * largest:
        yield (
            f"train the inner problem further. Its negative curvature ({smallest:.2g}) is of the size of the positive "
            f'({largest:.2g}): solver="minres" solves such a system, but there is no minimum to differentiate.'
        )
    if m.solved:
        yield f"keep {m.method.summary}, which took {m.info.steps} steps ({about})."
    elif negative and not strong:
        yield (
            f'solver={{"name": "cg", "damping": {lift:.2g}}}. It lifts negative eigenvalues above zero ({about}), '
            f'{BIAS}. Or solver="minres", which takes them as they are.'
        )
    elif smallest > 0 and m.info.status != Status.MAXITER:
        products = ceil(0.5 * (largest / smallest) ** 0.5 * log(2 / 1e-5))
        yield (
            f'solver={{"name": "cg", "maxiter": {2 * products}}}, which takes about {products} products ({about}). '
            f"Should it stagnate or meet negative curvature, damping={lift:.2g} helps, {BIAS}."
        )
    elif not strong:
        yield f'solver={{"name": "cg", "damping": {lift:.2g}}}. It bounds the condition number ({about}), {BIAS}.'
    damping = lift if negative else 0.0
    step = rounded(1 / (largest + above + damping), up=False)
    beside = f" with damping={damping:.2g}" if damping else ""
    yield (
        f"for neumann and unrolled, step_size={step:.2g}{beside}: one over the largest eigenvalue. From twice that on "
        "they diverge."
    )


def _for_an_equation(m: Measured) -> str:
    if m.solved:
        return f"keep {m.method.summary}, which took {m.info.steps} steps."
    return (
        'solver="gmres", or "bicgstab" if its vectors are too many to store: the system of a fixed point or a root is '
        'not symmetric. {"name": "neumann", "step_size": 1.0} where the step contracts.'
    )

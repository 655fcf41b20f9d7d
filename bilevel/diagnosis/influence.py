"""Find hyperparameters that have no influence, and params that the inner loss does not determine.

A product with a random vector shows rows of zeros: an entry that is exactly zero belongs to a row of zeros.
"""

from typing import NamedTuple

import numpy as np

from bilevel.diagnosis.finding import Finding
from bilevel.inspection.entries import Arrays, Entries, Share, shares
from bilevel.messages import listed


class Influence(NamedTuple):
    """The parts of hparams and params that the inner problem does not depend on.

    Attributes:
        unused: the leaves of hparams that neither F nor ∂L/∂w depends on.
        direct: the leaves of hparams that only F depends on.
        all_hparams: whether these are all leaves of hparams.
        absent: the entries of params that the inner loss does not depend on, but F does.
        straight: the other entries of params without curvature, with a gradient of L or F that is not zero.
    """

    unused: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    all_hparams: bool = False
    absent: tuple[Share, ...] = ()
    straight: tuple[Share, ...] = ()

    @property
    def flat(self) -> tuple[Share, ...]:
        """The entries of params without curvature that no solver can find."""
        return self.absent + self.straight


def has_zeros(here: Entries) -> bool:
    """Tell whether a product has zeros that another point should confirm."""
    return any((x == 0).any() for x in here.product.values()) or any(not x.any() for x in here.cross.values())


def influence(here: Entries, there: Entries | None) -> Influence:
    """Return what is exactly zero at two points. Without the second, only the curvature at the first is certain."""

    def idle(*trees: Arrays) -> set[str]:
        return {path for path, x in trees[0].items() if x.size and not any(tree[path].any() for tree in trees)}

    def missing(grad: np.ndarray, product: np.ndarray, other_grad: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (grad == 0) & (product == 0) & (other_grad == 0) & (other == 0)

    def no_curvature(product: np.ndarray, grad: np.ndarray, outer: np.ndarray, absent: np.ndarray) -> np.ndarray:
        return (product == 0) & ((grad != 0) | (outer != 0)) & ~absent

    if there is None:
        never = {path: np.zeros(x.shape, dtype=bool) for path, x in here.grad.items()}
        return Influence(straight=shares(no_curvature, here.product, here.grad, here.outer_params, never))
    no_cross = idle(here.cross, there.cross)
    nothing = no_cross & idle(here.outer_hparams, there.outer_hparams)
    absent = {
        path: missing(grad, here.product[path], there.grad[path], there.product[path])
        for path, grad in here.grad.items()
    }
    return Influence(
        unused=tuple(path for path in here.cross if path in nothing),
        direct=tuple(path for path in here.cross if path in no_cross - nothing),
        all_hparams=len(no_cross) == len(here.cross),
        absent=shares(lambda absent, outer: absent & (outer != 0), absent, here.outer_params),
        straight=shares(no_curvature, here.product, here.grad, here.outer_params, absent),
    )


def without_influence(found: Influence, equation: bool) -> list[Finding]:
    """Return a finding for hyperparameters without influence on the inner problem."""
    residual = "The residual" if equation else "∂L/∂w"
    use = (
        "Use the hparams argument inside inner. Values that are closed over, detached or converted to numbers have no "
        "derivative. If it is meant, leave them out of hparams"
    )
    sentences, way_out = [], f"{use}."
    if found.direct:
        every = found.all_hparams and not found.unused
        which, there = ("any of hparams", "") if every else (listed(found.direct), "there, ")
        sentences.append(f"{residual} does not depend on {which}: {there}the hypergradient is ∂F/∂λ only.")
        way_out = f"{use}, and use the gradient of F."
    if found.unused:
        nor = "the residual" if equation else residual
        sentences.append(f"Neither F nor {nor} depends on {listed(found.unused)}: there, the hypergradient is zero.")
    return [Finding("no influence", " ".join(sentences), way_out)] if sentences else []


def without_curvature(found: Influence, equation: bool, damped: bool) -> list[Finding]:
    """Return a finding for params that the inner problem does not determine."""
    if not found.flat:
        return []
    inner, matrix = ("The residual", "Jacobian") if equation else ("The inner loss", "Hessian")
    sentences = []
    if found.absent:
        sentences.append(f"{inner} does not depend on {listed(found.absent)}, but the outer loss does.")
    if found.straight:
        what = "has a derivative of zero by" if equation else "has no curvature in"
        sentences.append(f"{inner} {what} {listed(found.straight)}.")
    if damped:
        sentences.append(f"Rows of the {matrix} are zero, so only the damping determines the solution there.")
    else:
        sentences.append(f"Rows of the {matrix} are zero, so the linear system has no solution.")
    instead = "" if damped else " Damping also helps."
    way_out = f"Leave these entries out of params, or add a penalty on them to the inner loss.{instead}"
    return [Finding("no curvature", " ".join(sentences), way_out)]

"""How large the workloads are: in full, and for a smoke test."""

from typing import NamedTuple

CLASSES = 10
# Decays per weight, drawn between these: the Hessian is positive definite at random weights, where plain networks have
# negative curvature, and CG does not get to the precision of float32 within 100 products, so that all take as many.
DECAYS = (0.5, 500.0)


class Size(NamedTuple):
    """What a workload is made with; each uses what it needs."""

    width: int = 0
    features: int = 0
    length: int = 0  # of a sequence
    depth: int = 0
    batch: int = 256
    step_size: float = 1 / 600  # of Neumann and of unrolled steps: below 1/λmax


FULL = {
    "logistic": Size(features=200),
    "mlp": Size(width=680, features=784),
    "convnet": Size(width=8, features=6),
    "lstm": Size(width=64, features=16, length=12),
    "transformer": Size(width=32, length=8, depth=2),
}
QUICK = {
    "logistic": Size(features=5, batch=8),
    "mlp": Size(width=12, features=8, batch=8),
    "convnet": Size(width=4, features=6, batch=8),
    "lstm": Size(width=4, features=3, length=3, batch=4),
    "transformer": Size(width=8, length=3, depth=1, batch=4),
}
TINY = Size(features=9, batch=8)  # logistic regression of 100 weights: nothing but overhead
WORKLOADS = tuple(FULL)


def scaled(millions: float) -> Size:
    """Return an MLP of about so many million weights, on a batch of 64 so that the weights outweigh it."""
    width = round((millions * 1e6 / 2) ** 0.5)
    return Size(width=width, features=width, batch=64)

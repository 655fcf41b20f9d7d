"""A finding of `bl.diagnose` and `bl.diagnose_training`."""

from typing import NamedTuple


class Finding(NamedTuple):
    """An error of a hypergradient or metagradient.

    Attributes:
        name: "not finite", "not repeatable", "writes", "other arrays", "no influence", "wrong derivative",
            "not symmetric", "at kink", "no curvature", "negative curvature", "kink", "not solved", "solve failed" or
            "residual".
            For a metagradient:
            "not finite", "not predictive", "rough", "growth" or "precision".
        what: a description of the error.
        way_out: a remedy; "" if ``what`` contains it.
    """

    name: str
    what: str
    way_out: str

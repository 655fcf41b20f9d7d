"""A finding of `bl.diagnose`."""

from typing import NamedTuple


class Finding(NamedTuple):
    """An error of a hypergradient.

    Attributes:
        name: "not finite", "not repeatable", "writes", "other arrays", "no influence", "wrong derivative",
            "not symmetric", "no curvature", "kink", "not solved", "solve failed" or "residual".
        what: a description of the error.
        way_out: a remedy; "" if ``what`` contains it.
    """

    name: str
    what: str
    way_out: str

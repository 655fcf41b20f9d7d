"""Errors and warnings."""


class SolverError(RuntimeError):
    """A solve failed with ``on_failure="raise"``, or its result is not finite."""


class SolverWarning(UserWarning):
    """A solve failed with ``on_failure="warn"`` (the default)."""


class InnerProblemWarning(UserWarning):
    """Params do not solve the inner problem, so the hypergradient differs from the derivative of F(w*(λ), λ)."""


class DependenceWarning(UserWarning):
    """An objective does not depend on an argument, or depends on a trainable array that is no argument.

    If it is meant, ignore the category: ``warnings.simplefilter("ignore", bl.DependenceWarning)``.
    """

"""The two ways a solve can speak up. Bad input raises the built-in ``TypeError`` or ``ValueError``."""


class SolverError(RuntimeError):
    """A solve failed and ``on_failure="raise"`` was asked for, or its result is not finite."""


class SolverWarning(UserWarning):
    """A solve failed and ``on_failure="warn"`` (the default) was asked for."""

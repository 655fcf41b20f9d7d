"""Pictures of searches, solves and hyperparameters, as axes of matplotlib.

matplotlib is imported by the first call. Each function returns the axes, for changes and for ``ax.figure.savefig``.
"""

from bilevel.plot.convergence import convergence
from bilevel.plot.history import history
from bilevel.plot.hparams import hparams
from bilevel.plot.spectrum import spectrum

__all__ = ["convergence", "history", "hparams", "spectrum"]

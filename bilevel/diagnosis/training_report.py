"""The report of `bl.diagnose_training`."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from bilevel.diagnosis.finding import Finding
from bilevel.diagnosis.formatting import first_line
from bilevel.diagnosis.layout import WIDTH, Line, written
from bilevel.metagradients.results import Metagradient

PREDICTIVE = 0.8  # agreement; below, LDS was below 0.8 in the benchmark
SMOOTH = 0.5  # metasmoothness
PRECISE = 0.99  # cosine
GROWTH = 10.0  # of dF/dw backwards through the run
SMOOTHER = (
    "Runs become smoother with a smaller learning rate, a larger batch, warmup, smooth activations and average pooling "
    "in place of ReLU and max-pooling, normalization before nonlinearities, and a larger eps in Adam."
)


class Changes(NamedTuple):
    """Changes along one direction of λ.

    Attributes:
        predicted: the slopes of F by the metagradient, of shape (Q,).
        actual: the slopes by two trainings, of shape (Q,).
        smoothness: the metasmoothness of the weights.
    """

    predicted: np.ndarray
    actual: np.ndarray
    smoothness: float


@dataclass(frozen=True)
class TrainingDiagnosis:
    """The report of `bl.diagnose_training`, for ``print``.

    Attributes:
        metagradient: the metagradient.
        size: the size of the changes of λ.
        changes: a `Changes` for each direction.
        precision: agreement of the metagradient of the first steps with the same in float64, at most 1. nan: it is
            unknown.
        obstacle: the reason if the precision is unknown, or "".
        states: the number of states that F takes. If there are several, dF/dw grows at each, and this is no finding.
    """

    metagradient: Metagradient[Any, Any]
    size: float
    changes: tuple[Changes, ...]
    precision: float
    obstacle: str
    states: int = 1

    @property
    def agreement(self) -> float:
        """Agreement of predicted and actual slopes: 1 − ‖p − a‖ / (‖p‖ + ‖a‖), over all directions and queries."""
        predicted = np.concatenate([c.predicted for c in self.changes])
        actual = np.concatenate([c.actual for c in self.changes])
        total = np.linalg.norm(predicted) + np.linalg.norm(actual)
        return float(1 - np.linalg.norm(predicted - actual) / total) if total else 1.0

    @property
    def smoothness(self) -> float:
        """The mean metasmoothness of the directions."""
        return float(np.mean([c.smoothness for c in self.changes]))

    @property
    def growth(self) -> float:
        """The growth of dF/dw backwards in time."""
        return self.metagradient.info.growth

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings, the most serious first."""
        return tuple(_findings(self))

    def __str__(self) -> str:
        return written("bl.diagnose_training", self.findings, _lines(self))


def _lines(d: TrainingDiagnosis) -> Iterator[Line]:
    trainings = f"{2 * len(d.changes)} trainings with λ changed by {d.size:g}"
    yield {"not predictive"}, "agreement", f"{d.agreement:.3f} of predicted and actual changes of F, in {trainings}"
    yield {"rough"}, "metasmoothness", f"{d.smoothness:.3f}"
    yield {"growth"}, "growth", f"{d.growth:.3g} times backwards, over {d.metagradient.info.steps} steps"
    known = f"agreement {d.precision:.4f} with float64" if not isnan(d.precision) else first_line(d.obstacle, WIDTH)
    yield {"precision"}, "precision", known


def _findings(d: TrainingDiagnosis) -> Iterator[Finding]:
    if not d.metagradient.info.finite:
        yield Finding(
            "not finite", "The metagradient is not finite.", "bl.metagradient raises an error that tells where."
        )
        return
    if not all(np.isfinite(c.actual).all() for c in d.changes):
        yield Finding(
            "not predictive",
            f"The run diverges where λ changes by {d.size:g}, so the changes of F are unknown.",
            "Pass a smaller size. " + SMOOTHER,
        )
        return
    if not d.agreement >= PREDICTIVE:
        yield Finding(
            "not predictive",
            f"The metagradient predicts changes of F badly: the agreement is {d.agreement:.2f} where λ changes by "
            f"{d.size:g}. It holds for smaller changes only.",
            SMOOTHER if d.smoothness < SMOOTH else "Change λ in smaller steps, or make the run smoother. " + SMOOTHER,
        )
    if d.smoothness < SMOOTH:
        yield Finding(
            "rough",
            f"The weights do not follow λ smoothly: the metasmoothness is {d.smoothness:.2f}.",
            "" if not d.agreement >= PREDICTIVE else SMOOTHER,
        )
    if d.states == 1 and not d.growth <= GROWTH:
        yield Finding(
            "growth",
            f"dF/dw grows {d.growth:.3g} times backwards: the run magnifies small changes of early weights, as at the "
            "edge of stability.",
            "Use a smaller learning rate or warmup at the start, or clip gradients.",
        )
    if d.precision < PRECISE:
        yield Finding(
            "precision",
            f"Rounding errors change the metagradient: its agreement with float64 is {d.precision:.3f}.",
            "Train in float32. Or keep weights and optimizer states in float32, and only compute the losses in lower "
            "precision.",
        )

"""Check whether a metagradient predicts what a change of hyperparameters does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.diagnosis.training_report import Changes, TrainingDiagnosis
from bilevel.linearization import Inputs
from bilevel.metagradients.metagradient import metagradient
from bilevel.metagradients.outer import Outer
from bilevel.metagradients.results import Metagradient
from bilevel.metagradients.retrain import retrain
from bilevel.metagradients.schedule import Checkpoints
from bilevel.metagradients.training import Batches, Training, as_batches, check_training
from bilevel.spaces.array import Args, H
from bilevel.steps import floats_of, with_floats
from bilevel.validation import find_backend

EPS64 = 1e-15


def diagnose_training(
    training: Training,
    state: object,
    hparams: object,
    batches: object = None,
    *,
    steps: int | None = None,
    outer_args: Args = (),
    size: float = 0.2,
    directions: int = 2,
    precision_steps: int = 200,
    seed: int = 0,
    checkpoints: Checkpoints = "auto",
    memory: int | None = None,
    backend: Backend | str | None = None,
) -> TrainingDiagnosis:
    """Return a report, for printing, on whether a metagradient predicts the effect of a change of hparams.

    A metagradient is the exact derivative of a run. But a run may be rough: then its derivative holds only for changes
    that are too small to be of use. The report trains again with λ ± ``size``·d for random directions d of ±1 (times
    the root mean square of each leaf of λ, or 1 for a leaf of zeros), from the same first state, with the same batches
    and random numbers. It measures

    - the *agreement* of the predicted and the actual changes of F, from 0 to 1. This number ranks runs best by how well
      their metagradients predict losses after retraining without examples (``benchmarks/metagradients``).
    - the *metasmoothness*: whether the weights change in the same direction from λ − ``size``·d to λ and on to
      λ + ``size``·d, from −1 to 1 (Engstrom et al., arXiv 2503.13751, section 4).
    - the *growth* of dF/dw backwards in time.
    - the *precision*: 2 g·h / (‖g‖² + ‖h‖²) for the metagradient g of the first steps and the same h in float64. If
      their norms are equal, this is their cosine.

    It takes 2 ``directions`` + 1 trainings and one metagradient. The precision takes two metagradients of a part of the
    run, unless it is in float64.

    Args:
        training, state, hparams, batches, steps, outer_args, checkpoints, memory, backend: as in `bl.metagradient`.
        size: the change of λ, > 0. Choose the size of the changes that you will make. Leaving out 5 % of the examples
            changes weights of 1 by 0.22 in the root mean square.
        directions: the number of random directions, >= 1.
        precision_steps: the number of first steps whose metagradient is also computed in float64, >= 0. 0: none. Few
            steps may hide rounding errors that grow.
        seed: the seed of the directions.

    Returns:
        A `TrainingDiagnosis`. ``ok`` is true if there are no ``findings``.

    Raises:
        TypeError, ValueError: for invalid input.

    >>> import numpy as np, bilevel as bl
    >>> class Descend:  # w ← w − (w − λ)/2
    ...     def __call__(self, w, lam, batch): return (w + lam) / 2
    ...     def vjp_params(self, w, lam, v, batch): return v / 2
    ...     def vjp_hparams(self, w, lam, v, batch): return v / 2
    >>> outer = bl.problems.quadratic(np.eye(2), np.eye(2), target=np.zeros(2)).outer
    >>> report = bl.diagnose_training(bl.Training(Descend(), outer), np.zeros(2), np.ones(2), steps=5)
    >>> report.ok, round(report.agreement, 6), report.smoothness
    (True, 1.0, 1.0)
    """
    _check(size, directions, precision_steps)
    check_training(training)
    if hparams is None:
        raise ValueError("hparams is None, but diagnose_training changes hparams.")
    found = find_backend(backend, state, hparams, ("state", "hparams"))
    common: dict[str, Any] = {
        "outer_args": outer_args,
        "checkpoints": checkpoints,
        "memory": memory,
        "backend": found,
        "on_failure": "ignore",
    }
    generators = found.steps(training.step)
    random = generators.random_state()
    try:
        hg = metagradient(training, state, hparams, batches, steps=steps, **common)
        data = as_batches(found, batches, hg.info.steps)
        changes: list[Changes] = []
        for direction in _directions(found, hparams, directions, np.random.default_rng(seed)):
            ends: list[tuple[Any, Outer]] = []
            for sign in (-1.0, 1.0):
                generators.set_random_state(random)
                moved = found.space(hparams).axpy(sign * size, direction, hparams)
                ends.append(retrain(found, training, state, moved, data, outer_args, hg.info.bounds))
            changes.append(_changes(found, hg, ends, direction, size))
        generators.set_random_state(random)
        first = min(precision_steps, data.steps)
        known = hg if first == data.steps else None
        precision, obstacle = _precision(found, training, state, hparams, data, first, common, known)
    finally:
        generators.set_random_state(random)
    return TrainingDiagnosis(hg, size, tuple(changes), precision, obstacle, len(training.at or (0,)))


def _check(size: object, directions: object, precision_steps: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise TypeError(f"size: expected a number > 0, got {size!r}.")
    if not 0 < size < float("inf"):
        raise ValueError(f"size: expected a number > 0, got {size!r}.")
    for name, count, least in (("directions", directions, 1), ("precision_steps", precision_steps, 0)):
        if type(count) is not int:
            raise TypeError(f"{name}: expected an integer >= {least}, got {count!r}.")
        if count < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {count!r}.")


def _directions(backend: Backend, hparams: H, count: int, rng: np.random.Generator) -> Iterator[H]:
    """Yield trees of ±1, times the root mean square of each leaf."""
    leaves = [backend.to_numpy(leaf).astype(np.float64).ravel() for _, leaf in backend.leaves(hparams)]
    scales = [np.linalg.norm(a) / max(1, a.size) ** 0.5 or 1.0 for a in leaves]
    for _ in range(count):
        signs = [scale * rng.choice([-1.0, 1.0], a.size) for a, scale in zip(leaves, scales, strict=True)]
        yield backend.from_flat(np.concatenate(signs), hparams)


def _changes(
    backend: Backend, hg: Metagradient[Any, Any], ends: list[tuple[Any, Outer]], direction: object, size: float
) -> Changes:
    """Return predicted and actual changes of F per unit of change of λ, and the metasmoothness."""
    values = [np.atleast_1d(backend.to_numpy(outer.value)).astype(np.float64) for _, outer in ends]
    slopes = np.zeros(len(values[0]))
    for (_, g), (_, d) in zip(backend.leaves(hg.grad), backend.leaves(direction), strict=True):
        slopes += backend.to_numpy(g).astype(np.float64).reshape(len(slopes), -1) @ backend.to_numpy(d).ravel()
    weights_of = ends[0][1].weights_of
    back, here, there = (
        np.concatenate([backend.to_numpy(a).ravel().astype(np.float64) for a in weights_of(floats_of(backend, state))])
        for state in (ends[0][0], hg.state, ends[1][0])
    )
    return Changes(slopes, (values[1] - values[0]) / (2 * size), _sign_agreement(here - back, there - here))


def _sign_agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean product of the signs of two changes, weighted by the sizes of the first."""
    total = np.abs(first).sum()
    return float((first * np.sign(second)).sum() / total) if total else float("nan")


def _precision(
    backend: Backend,
    training: Training,
    state: Any,
    hparams: Any,
    data: Batches,
    steps: int,
    common: dict[str, Any],
    known: Metagradient[Any, Any] | None,
) -> tuple[float, str]:
    """Return the agreement of the metagradient of the first steps with float64, or nan and the reason.

    ``known`` is this metagradient, if it has been computed.
    """
    if not steps:
        return float("nan"), "not checked"
    if max(backend.space(tree).eps for tree in (floats_of(backend, state), hparams)) < EPS64:
        return float("nan"), "the run is in float64"
    at = None if training.at is None else tuple(min(t, steps) for t in training.at)
    if at is not None and len({*at}) < len(at):
        return float("nan"), f"outer uses several states after step {steps}"
    short = Training(training.step, training.outer, at)
    start, args = backend.steps(training.step).start(state), tuple(data[t] for t in range(steps))
    floats = floats_of(backend, start)

    def metagradient_in(double: bool) -> Metagradient[Any, Any]:
        with backend.isolated(Inputs(floats, hparams, args, common["outer_args"]), double) as at:
            params, moved, batches, outer_args = at(floats, hparams)
            first = with_floats(backend, start, params)
            return metagradient(short, first, moved, list(batches), **{**common, "outer_args": outer_args})

    try:
        found = known or metagradient_in(double=False), metagradient_in(double=True)
    except Exception as error:  # any error of the user's step in float64
        return float("nan"), f"{type(error).__name__}: {error}"
    grads = [[backend.to_numpy(g).ravel() for _, g in backend.leaves(hg.grad)] for hg in found]
    low, high = (np.concatenate(parts).astype(np.float64) for parts in grads)
    squares = low @ low + high @ high
    if not np.isfinite(squares) or not squares:
        kind = "zero" if squares == 0 else "not finite"
        return float("nan"), f"the metagradient of the first {steps} steps is {kind}"
    return float(2 * low @ high / squares), ""

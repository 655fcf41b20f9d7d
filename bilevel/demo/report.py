"""The demo's results as text."""

from typing import Any

from bilevel.demo.models import Model
from bilevel.demo.search import Outcome, Run, Score, Task

CLEAR = 1.02  # the least ratio of two losses that counts as a difference


def opening(task: Task, backend: str, solver: Any) -> str:
    """Return a description of the run."""
    model, sizes = task.model, [len(y) for _, y in (task.train, task.validation, task.test)]
    return (
        f"bilevel demo: scikit-learn's digits, {model.name}, {backend} backend\n"
        f"  {sizes[0]} images to train on, {sizes[1]} for validation, {sizes[2]} to test\n"
        f"  grid search: one penalty for all weights, {len(model.grid)} values from {model.grid[0]:g} to "
        f"{model.grid[-1]:g}, the best on validation\n"
        f"  tuning: a penalty for each of the {task.size:,} weights, from {model.start:g} for all, by up to "
        f"{model.maxiter} steps of L-BFGS-B on validation,\n"
        f"    within {model.bounds[0]:g} to {model.bounds[1]:g}; hypergradients by {solver}\n"
    )


def scores(model: Model, outcome: Outcome) -> str:
    """Return the losses and accuracies as a table."""
    return table(
        [
            (f"start: {model.start:g} for all", outcome.scores[0]),
            (f"best shared: {outcome.shared_penalty:.2g} for all", outcome.shared),
            ("tuned: one per weight", outcome.scores[-1]),
        ]
    )


def table(rows: list[tuple[str, Score]]) -> str:
    """Return named scores as a table.

    >>> print(table([("tuned", Score(0.0721, 0.991, 0.1398, 0.964))]))
      penalty                             validation                test
                                      loss  accuracy      loss  accuracy
      tuned                         0.0721     99.1%    0.1398     96.4%
    """
    lines = [f"  {'penalty':<28}{'validation':>18}{'test':>20}", f"  {'':<28}" + 2 * f"{'loss':>8}{'accuracy':>10}  "]
    for name, s in rows:
        validation = f"{s.validation_loss:>8.4f}{s.validation_accuracy:>10.1%}"
        lines.append(f"  {name:<28}{validation}{s.test_loss:>10.4f}{s.test_accuracy:>10.1%}")
    return "\n".join(line.rstrip() for line in lines)


def verdict(outcome: Outcome) -> str:
    """Return a comparison of the tuned penalties with the best shared penalty on the test images."""
    shared, last = outcome.shared, outcome.scores[-1]
    losses = [score.test_loss for score in outcome.scores]
    ratio = last.test_loss / shared.test_loss
    if last.validation_loss > shared.validation_loss:
        text = "The search ended before it reached the best shared penalty. Try a more exact solver."
    elif ratio * CLEAR < 1:
        text = f"On test, the loss is {1 - ratio:.0%} lower than with the best shared penalty."
    elif ratio > CLEAR:
        text = (
            f"On test, the loss is {ratio - 1:.0%} higher than with the best shared penalty: the tuned penalties "
            "overfit the validation images."
        )
    else:
        text = "On test, the loss is about the same as with the best shared penalty."
    if losses[-1] > min(losses) * CLEAR:
        text += (
            f"\n  It was lowest, {min(losses):.4f}, after step {losses.index(min(losses))}. Later penalties overfit "
            "the validation images."
        )
    return "  " + text


def facts(outcome: Outcome, weights: int, errors: list[float], seconds: float) -> str:
    """Return the numbers of the run. A second error is relative to the Hessian without the solver's damping."""
    lines = [
        f"hyperparameters            {outcome.hyperparameters:,}",
        f"hypergradients             {outcome.hypergradients}",
        f"Hessian-vector products    {outcome.steps:,}: one per solver step; checks, sketches, step sizes take more",
        f"hypergradient's error      {errors[0]:.1e}, relative to the dense Hessian's result on a small instance",
        f"                           ({weights} weights, images at half the resolution)",
    ]
    if len(errors) > 1:
        lines[-1] += "; that Hessian includes"
        lines.append(f"                           the solver's damping: without it, the error is {errors[1]:.1e}")
    lines.append(f"wall time                  {seconds:.1f} s")
    return "\n".join(["", *("  " + line for line in lines)])


def summary(runs: list[Run]) -> str:
    """Return a table of several runs: the best shared penalty and the tuned penalties, on the test images."""
    lines = [
        f"{'summary, on test':<18}{'penalties':>10}{'loss: shared':>15}{'tuned':>9}{'accuracy: shared':>19}{'tuned':>8}"
        f"{'time':>8}"
    ]
    for run in runs:
        shared, tuned = run.outcome.shared, run.outcome.scores[-1]
        losses = f"{shared.test_loss:>15.4f}{tuned.test_loss:>9.4f}"
        accuracies = f"{shared.test_accuracy:>19.1%}{tuned.test_accuracy:>8.1%}"
        lines.append(f"{run.backend:<18}{run.outcome.hyperparameters:>10,}{losses}{accuracies}{run.seconds:>6.0f} s")
    lines.append(f"{'all':<18}{sum(run.seconds for run in runs):>67.0f} s")
    return "\n".join(lines)

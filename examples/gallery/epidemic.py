"""Smoothness of a transmission rate over time, in a model of an epidemic, by held-out days.

    python examples/gallery/epidemic.py [--fast] [--figure FILE.png]

Six regions have the model of susceptible, infectious and recovered people (SIR). The rate of transmission changes from
day to day. It is found from the counts of cases, with a penalty on changes of its logarithm. A lockdown and an opening
are abrupt, and all else is smooth. So one weight of the penalty is too weak for the calm weeks or too strong for these
two. `bl.minimize` finds a weight per week, by the likelihood of days that the fit does not see.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import minimize

import bilevel as bl

REGIONS, DAYS, PEOPLE, HELD_OUT = 6, 91, 1e6, 0.25
RECOVERY, REPORTED = 0.1, 0.05  # of the infectious, per day; of the new infections
LOCKDOWN, OPENING, REGION = 30, 63, 5  # REGION: for the picture
GRID = np.linspace(0, 8, 17)  # logarithms of weights
WEEKS = -(-(DAYS - 1) // 7)
Params = dict[str, jax.Array]
FIRST = {"rates": np.full((DAYS, REGIONS), np.log(0.15)), "start": np.full(REGIONS, np.log(400.0))}


class Counts(NamedTuple):
    """Counts of cases of shape (days, regions), and which of them count: 1 or 0."""

    cases: np.ndarray
    mask: np.ndarray


def simulate(rates: Any, start: Any) -> jax.Array:
    """Return expected cases of shape (days, regions), from rates of this shape and the infectious of the first day."""

    def day(state: tuple[jax.Array, jax.Array], rate: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        susceptible, infectious = state
        new = susceptible * -jnp.expm1(-rate * infectious / PEOPLE)
        return (susceptible - new, (1 - RECOVERY) * infectious + new), new

    return REPORTED * jax.lax.scan(day, (PEOPLE - start, start), rates)[1]


def misfit(params: Params, data: Counts) -> jax.Array:
    """Return half the mean deviance of Poisson counts. For the true rates, it is about 0.5."""
    expected = simulate(jnp.exp(params["rates"]), jnp.exp(params["start"]))
    cases = jnp.maximum(data.cases, 0.5)  # the logarithm of zero cases counts zero times
    deviance = expected - data.cases + data.cases * jnp.log(cases / expected)
    return (data.mask * deviance).sum() / data.mask.sum()


def inner(params: Params, logs: jax.Array, data: Counts) -> jax.Array:
    """Return the misfit and the penalty, with a weight per week."""
    weights = jnp.repeat(jnp.exp(logs), 7)[: DAYS - 1, None]
    return misfit(params, data) + (weights * jnp.diff(params["rates"], axis=0) ** 2).mean() / 2


def outer(params: Params, logs: jax.Array, data: Counts) -> jax.Array:
    """Return the misfit of the days that are held out."""
    return misfit(params, data)


PROBLEM = bl.Problem(inner, outer)


def unravel(x: Any) -> Params:
    """Return params from their entries as one vector."""
    return {"rates": x[:-REGIONS].reshape(DAYS, REGIONS), "start": x[-REGIONS:]}


@jax.jit
def derivatives(x: Any, logs: jax.Array, data: Counts) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the inner objective, its gradient and its Hessian, by the entries of params as one vector."""
    objective = lambda x: inner(unravel(x), logs, data)  # noqa: E731
    return objective(x), jax.grad(objective)(x), jax.hessian(objective)(x)


def fit(logs: jax.Array, params: Params, data: Counts) -> Params:
    """Minimize the inner objective by Newton's method in a trust region."""
    of = cache(lambda x: [np.asarray(d) for d in derivatives(np.frombuffer(x), logs, data)])
    value, grad, hessian = (lambda x, i=i: of(x.tobytes())[i] for i in range(3))
    x = np.concatenate([np.ravel(params["rates"]), params["start"]])
    found = minimize(value, x, jac=grad, hess=hessian, method="trust-exact", options={"gtol": 1e-6})
    return unravel(jnp.asarray(found.x))


def make(seed: int) -> tuple[np.ndarray, Counts, Counts]:
    """Return true rates, and counts to fit and to hold out."""
    rng, days = np.random.default_rng(seed), np.arange(DAYS)
    changes = [0, LOCKDOWN, LOCKDOWN + 4, OPENING, OPENING + 4]  # a change takes four days
    level = np.interp(days, changes, np.log([0.25, 0.25, 0.06, 0.06, 0.14]))[:, None]
    waves = 0.1 * np.sin(2 * np.pi * (days[:, None] / rng.uniform(40, 80, REGIONS) + rng.random(REGIONS)))
    rates = np.exp(level + waves + 0.1 * rng.standard_normal(REGIONS))
    cases = rng.poisson(np.asarray(simulate(rates, np.full(REGIONS, 400.0))))
    held_out = rng.random(cases.shape) < HELD_OUT
    return rates, Counts(cases, 1.0 - held_out), Counts(cases, 1.0 * held_out)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Tune one weight by grid search, then a weight per week by hypergradients; print a table, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="a file for the picture")
    options = parser.parse_args(argv)
    with jax.enable_x64(True):
        return tune(options)


def tune(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Do what `main` says."""
    rates, train, held_out = make(options.seed)
    params = FIRST

    began = time.perf_counter()
    trials = []
    for log in GRID[::-4] if options.fast else GRID[::-1]:  # the smoothest rates first
        logs = jnp.full(WEEKS, log)
        params = fit(logs, params, train)
        trials.append((float(outer(params, logs, held_out)), logs, params))
    _, logs, params = min(trials, key=lambda trial: trial[0])
    split = time.perf_counter()
    found = bl.minimize(
        PROBLEM,
        logs,
        fit=lambda logs, params: fit(logs, params, train),
        params0=params,
        inner_args=(train,),
        outer_args=(held_out,),
        solver=bl.CG(maxiter=2000),
        bounds=(-2, 12),
        maxiter=3 if options.fast else 30,
    )
    end = time.perf_counter()

    table = {}
    shown = {"one weight, grid search": (params, logs), "a weight per week": (found.params, found.x)}
    print(f"{'':<28}{'held-out misfit':>18}{'error of rates':>18}{'seconds':>10}")
    for (name, (params, logs)), seconds in zip(shown.items(), (split - began, end - split), strict=True):
        error = float(jnp.sqrt(((params["rates"] - jnp.log(rates)) ** 2).mean()))
        table[name] = {"misfit": float(outer(params, logs, held_out)), "error": error, "seconds": seconds}
        print(f"{name:<28}{table[name]['misfit']:>18.4f}{error:>18.4f}{seconds:>10.1f}")
    if options.figure:
        draw(rates, shown, options.figure)
    return table


def draw(rates: np.ndarray, shown: dict[str, tuple[Params, Any]], path: Path) -> None:
    """Draw the rates of a region, and the weights."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(rates[:, REGION], "k", lw=1, label="true")
    for name, (params, logs) in shown.items():
        left.plot(np.exp(params["rates"][:, REGION]), label=name)
        right.step(np.arange(len(logs)) * 7, np.exp(logs), where="post")
    left.set(xlabel="day", ylabel="transmission rate", title="one of six regions")
    right.set(xlabel="day", ylabel="weight of smoothness", yscale="log")
    left.legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()

"""Approximate inverse Hessians in the middle of a training."""

from typing import Any

import numpy as np

from report.common import spread, table

Groups = dict[str, list[dict[str, Any]]]
TITLES = {"midway-boston": "Boston housing", "midway-diabetes": "diabetes"}
SHOWN = ["identity", "Neumann 5", "Neumann 20", "CG 5", "CG 20", "damped CG 5", "damped CG 20"]
YARDSTICKS = {"run": "the derivative of the whole run", "inverse": "the damped inverse"}
EARLY = 100  # the last step that counts as early


def passage(groups: Groups) -> str:
    """Return what follows the section on the optimum."""
    groups = {name: groups[name] for name in TITLES if name in groups}
    first = next(iter(groups.values()))
    every = [row for group in groups.values() for history in group for row in history["rows"]]
    worst = max(abs(row["undamped inverse, run"]) for row in every)
    return f"""\
The paper measures in mid-training. So the tanh networks are also compared during {first[0]["rows"][-1]["step"]:,.0f}
steps of gradient descent (rate {first[0]["settings"]["rate"]:g}). There the Hessian has negative eigenvalues. Its
undamped inverse is no yardstick: the largest absolute cosine with the derivative of the run is {worst:.2f}. Two
yardsticks remain. The first is the derivative of the validation loss by the decays through all steps so far
(`bl.metagradient`). The second is the exact inverse with a damping of twice the least eigenvalue. "Damped CG" has
this damping, and the other methods have none. CG without damping stops at negative curvature. Cosines with
{YARDSTICKS["run"]}:

{_cosines(groups, "run")}
Cosines with {YARDSTICKS["inverse"]}:

{_cosines(groups, "inverse")}
{_verdict(groups)} {" ".join(_order(every, yardstick) for yardstick in YARDSTICKS)} {_damped(every)}
"""


def _cosines(groups: Groups, yardstick: str) -> str:
    head = ["data", "step", "least eigenvalue", "other yardstick", *SHOWN]
    rows = []
    for name, group in groups.items():
        for of_step in zip(*(history["rows"] for history in group), strict=True):
            found = [{"result": row} for row in of_step]
            cells = [spread(found, key, ".2f") for key in ("yardsticks", *(f"{shown}, {yardstick}" for shown in SHOWN))]
            rows.append([TITLES[name], f"{of_step[0]['step']:,.0f}", spread(found, "least", ".2f"), *cells])
    return table(head, rows)


def _order(rows: list[dict[str, float]], yardstick: str) -> str:
    """Say how often 5 Neumann terms have a greater cosine than 5 steps of CG, early and late."""

    def ahead(other: str, part: list[dict[str, float]]) -> str:
        wins = sum(row[f"Neumann 5, {yardstick}"] > row[f"{other} 5, {yardstick}"] for row in part)
        return f"{wins} of {len(part)}"

    early, late = ([row for row in rows if (row["step"] <= EARLY) == first] for first in (True, False))
    said = f"Take {YARDSTICKS[yardstick]} as the yardstick. Up to step {EARLY}, 5 Neumann terms are ahead of 5 steps"
    said += f" of CG in {ahead('CG', early)} comparisons. They are ahead of damped CG in {ahead('damped CG', early)}."
    if late:
        said += f" Later, these are {ahead('CG', late)} and {ahead('damped CG', late)}."
    return said


def means(groups: Groups) -> dict[str, float]:
    """Return the mean cosines with the derivative of the run, up to the last early step."""
    every = [row for name in TITLES for history in groups.get(name, ()) for row in history["rows"]]
    early = [row for row in every if row["step"] <= EARLY]
    return {name: float(np.mean([row[f"{name}, run"] for row in early])) for name in SHOWN}


def _damped(rows: list[dict[str, float]]) -> str:
    """Say where more products of CG without damping are worse, which is what the damping is for."""
    lost = sum(row["CG 20, run"] < row["CG 5, run"] for row in rows)
    change = max(abs(row[f"damped Neumann 5, {key}"] - row[f"Neumann 5, {key}"]) for row in rows for key in YARDSTICKS)
    return (
        f"Without damping, 20 steps of CG are worse than 5 in {lost} of {len(rows)}. The damping changes the cosine of "
        f"5 Neumann terms by at most {change:.2f}."
    )


def _verdict(groups: Groups) -> str:
    """Say whether the paper's finding holds, in the means of the early steps."""
    early = means(groups)
    found = {name: early[name] for name in ("Neumann 5", "CG 5", "damped CG 5")}
    values = ", ".join(f"{value:.2f} ({name})" for name, value in found.items())
    near = found["Neumann 5"] > max(found["CG 5"], found["damped CG 5"]) - 0.05
    said = ("comparable to CG or better, as in the paper," if near else "behind CG") + " early in a training"
    return f"The mean cosines with {YARDSTICKS['run']} up to step {EARLY} are {values}. So 5 Neumann terms are {said}."

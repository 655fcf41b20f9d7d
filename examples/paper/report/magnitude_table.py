"""The table of one task of magnitudes.py: gains, costs, and differences to searches at the same cost."""

import math
from typing import Any, NamedTuple

import numpy as np

from report.common import spread, table

NAMES = {
    "none": "none",
    "hand": "chosen by hand",
    "random": "random search",
    "optuna": "Optuna",
    "metagradient": "metagradients",
    "identity": "identity",
    "neumann": "3 Neumann terms",
    "cg": "CG, 10 steps",
    "config": "solver of --config",
}
SEARCHES = ("random", "optuna")  # the others are compared with them
REFERENCES = ("none", "hand", *SEARCHES)  # without derivatives
REPEATED = (*SEARCHES, "metagradient")  # their rows are trainings
SHARE = 0.8  # of the gain by hand, a target
Runs = dict[str, list[dict[str, Any]]]


class Line(NamedTuple):
    """Trainings with magnitudes that were found in one way, one for each seed."""

    variant: str
    name: str
    results: list[dict[str, float]]
    costs: list[float]  # CPU times, in plain trainings

    @property
    def accuracies(self) -> np.ndarray:
        return np.array([100 * result["test_accuracy"] for result in self.results])


def lines(runs: Runs) -> list[Line]:
    """Return a line for each way to find magnitudes, and another line if it trained again."""
    found = []
    for variant, of in runs.items():
        name = f"{NAMES[variant]}, {len(of[0]['rows'])} trainings" if variant in REPEATED else NAMES[variant]
        results, costs = [history["result"] for history in of], costs_of(variant, runs)
        found.append(Line(variant, name, results, costs))
        if "again_test_accuracy" in results[0]:
            again = [{key: result[f"again_{key}"] for key in ("test_accuracy", "val_loss")} for result in results]
            found.append(Line(variant, f"{name}, trained again", again, [cost + 1 for cost in costs]))
    return found


def costs_of(variant: str, runs: Runs) -> list[float]:
    """Return the CPU time of a variant for each seed, in plain trainings of the same seed."""
    if variant in ("none", "hand", *SEARCHES):
        return [float(len(history["rows"])) if variant in SEARCHES else 1.0 for history in runs[variant]]
    if variant == "metagradient":  # the last training is a plain one
        return [history["cpu_seconds"] / history["rows"][-1]["cpu_seconds"] for history in runs[variant]]
    plain = zip(*(runs[name] for name in ("none", "hand", "random")), strict=False)
    seconds = [np.mean([a["cpu_seconds"], b["cpu_seconds"], *_seconds(c)]) for a, b, c in plain]
    return [float(history["cpu_seconds"] / own) for history, own in zip(runs[variant], seconds, strict=False)]


def results(runs: Runs, target: float | None) -> str:
    """Return the table of a task, and the lines that meet the targets."""
    found = lines(runs)
    none, hand = (next(line for line in found if line.variant == variant) for variant in ("none", "hand"))
    by_hand = gains(hand, none).mean()
    searches = [name for name in SEARCHES if name in runs]
    rows = []
    for line in found:
        gain = gains(line, none)
        cells = [line.name, shown(line.accuracies)]
        cells += ["", ""] if line is none else [shown(gain), f"{gain.mean() / by_hand:.0%}"]
        cells += [spread([{"result": result} for result in line.results], "val_loss"), f"{np.mean(line.costs):.1f}"]
        rows.append(cells + [_difference(line, name, runs) for name in searches])
    head = ["magnitudes", "test accuracy, %", "gain", "share of the gain by hand", "validation loss", "cost"]
    followed = [line for line in found if line.variant not in REFERENCES]
    met = [(f"At least {SHARE:.0%} of the gain by hand", [gains(x, none).mean() >= SHARE * by_hand for x in followed])]
    if target:
        met.insert(0, (f"Mean gains of at least {target} points", [gains(x, none).mean() >= target for x in followed]))
    for name in searches:
        ratios = [_ratio(ahead(line, runs[name])) for line in followed]
        met.append((f"More than two standard errors ahead of {NAMES[name]}", [ratio > 2 for ratio in ratios]))
        met.append((f"More than two standard errors behind {NAMES[name]}", [ratio < -2 for ratio in ratios]))
    verdicts = "\n".join(f"- {what}: {_those(followed, which)}." for what, which in met)
    return table([*head, *(f"ahead of {NAMES[name]}" for name in searches)], rows) + f"\n{verdicts}\n"


def gains(line: Line, none: Line) -> np.ndarray:
    """Return the difference to no augmentation of each seed, in points."""
    return np.subtract(*_paired(line.accuracies, none.accuracies))


def ahead(line: Line, search: list[dict[str, Any]]) -> np.ndarray:
    """Return the difference to a search in the same CPU time, for each seed, in points."""
    pairs = zip(search, line.costs, strict=False)  # one may have fewer seeds
    best = np.array([search_of(history, cost)["test_accuracy"] for history, cost in pairs])
    return np.subtract(*_paired(line.accuracies, 100 * best))


def search_of(history: dict[str, Any], cost: float) -> dict[str, Any]:
    """Return the best of the trainings of a search that begin in the time of so many."""
    return min(history["rows"][: max(1, math.ceil(cost))], key=lambda row: row["val_loss"])


def shown(values: np.ndarray) -> str:
    """Return mean ± standard deviation."""
    return spread([{"result": {"": value}} for value in values], "", ".1f")


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of the seeds that both have."""
    n = min(len(a), len(b))
    return a[:n], b[:n]


def _error(values: np.ndarray) -> float:
    """Return the standard error of the mean; of one value, it is not known."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _ratio(values: np.ndarray) -> float:
    return float(values.mean() / max(_error(values), np.finfo(float).tiny))


def _seconds(history: dict[str, Any]) -> list[float]:
    return [row["cpu_seconds"] for row in history["rows"]]


def _difference(line: Line, search: str, runs: Runs) -> str:
    """Return how far a line is ahead of a search, unless it is a reference that comes before it."""
    if line.variant in REFERENCES[: REFERENCES.index(search) + 1]:
        return ""
    values = ahead(line, runs[search])
    error = f" ± {_error(values):.1f}" if len(values) > 1 else ""
    return f"{values.mean():+.1f}{error} ({sum(values > 0)} of {len(values)})"


def _those(found: list[Line], which: list[bool]) -> str:
    """Return the names of some lines, or of the others if these are fewer."""
    names = [line.name for line, flag in zip(found, which, strict=True) if flag]
    others = [line.name for line in found if line.name not in names]
    if len(others) < len(names):
        return "all but " + "; ".join(others) if others else "all"
    return "; ".join(names) or "none"

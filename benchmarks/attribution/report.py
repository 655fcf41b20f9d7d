"""Tables in Markdown of what was measured."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.attribution.lds import spearman
from benchmarks.attribution.methods import AUTO


def show(result: dict[str, Any]) -> None:
    """Print all tables."""
    about = result["about"]
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    print(f"\nMeasured on {about['date']} in {about['minutes']} minutes with {versions}.")
    for optimizer in ("momentum", "adam"):
        if records := [r for r in result["cosines"] if r["training"]["optimizer"] == optimizer]:
            print(f"\n### Cosine to the derivative of the whole run, {optimizer}\n")
            _cosines(records)
    print("\n### Retraining without 5 % of the examples\n")
    _scores(result["scores"])
    print("\n### Measures that might tell the cosine of CG with the automatic damping\n")
    _measures(result["cosines"])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    head = list(head)
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |")


def _number(x: float, form: str = ".2f") -> str:
    return "–" if math.isnan(x) else format(x, form)


def _cosines(records: list[dict[str, Any]]) -> None:
    """Print a row for each method, with means over seeds."""
    places: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records:
        places.setdefault((record["network"], record["training"]["steps"]), []).append(record)

    def mean(method: str, records: list[dict[str, Any]], column: int) -> float:
        return float(np.mean([record["rows"][method][column] for record in records]))

    rows = []
    for method in records[0]["rows"]:
        cosines = (_number(mean(method, group, 0)) for group in places.values())
        rows.append([method, *cosines, _number(mean(method, records, 1), ".0f")])
    _table(["", *(f"{name}, {steps}" for name, steps in places), "products"], rows)


def _scores(scores: list[dict[str, Any]]) -> None:
    """Print a table of scores for each setting."""
    for each in scores:
        training = each["training"]
        print(
            f"**{each['network']}**, {training['steps']} steps of {training['optimizer']}, batches of "
            f"{training['batch']}, {each['runs']} retrainings, {each['queries']} queries\n"
        )
        head = ["", "score", "cosine to the whole run", "products"]
        _table(head, ([m, _number(s), _number(c), _number(p, ".0f")] for m, (s, c, p) in each["rows"].items()))
        print()


def correlations(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the rank correlation of each measure with the cosine of CG with the automatic damping, best first."""
    truth = [record["rows"][AUTO][0] for record in records]
    found = {name: spearman([r["measures"][name] for r in records], truth) for name in records[0]["measures"]}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _measures(records: list[dict[str, Any]]) -> None:
    """Print the rank correlation of each measure with the cosine, over all settings and within each network."""
    networks = list(dict.fromkeys(record["network"] for record in records))
    within = [correlations([r for r in records if r["network"] == name]) for name in networks]
    rows = (
        [measure, _number(value), *(_number(each[measure]) for each in within)]
        for measure, value in correlations(records).items()
    )
    _table(["", f"all {len(records)} settings", *networks], rows)

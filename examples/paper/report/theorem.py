"""Theorem 2: Neumann products are unrolled steps."""

from pathlib import Path
from typing import Any

import numpy as np

from report.common import by_variant, draw, table

Histories = dict[str, dict[str, Any]]


def row(histories: Histories) -> tuple[str, str, str]:
    """Return the title, the paper's figure and ours."""
    largest = max(history["result"]["difference"] for history in _measured(histories).values())
    return (
        "Theorem: Neumann products are unrolled steps",
        "a proof, no figure",
        f"equal to {largest:.0e} (relative), in {', '.join(_frameworks(histories))}",
    )


def section(histories: Histories, pictures: Path) -> str:
    """Return the section."""
    measured, frameworks = _measured(histories), _frameworks(histories)
    results = [history["result"] for history in measured.values()]
    assert all(result["difference"] < 1e-8 for result in results)
    assert all(result["above 2/λmax"] == "DIVERGED" and result["below 2/λmax"] == "CONVERGED" for result in results)
    rows = [r for history in measured.values() for r in history["rows"]]
    assert all(r["adjoint_error"] <= r["bound"] + 1e-10 for r in rows)
    terms = [row["terms"] for row in next(iter(measured.values()))["rows"]]
    lines = [
        [
            f"{kind}, {framework}",
            history["result"]["weights"],
            f"{history['result']['condition']:,.0f}",
            f"{history['result']['difference']:.1e}",
            f"{history['result']['error']:.1e}",
            f"{_rate(history):.5f}",
            f"{1 - 1 / history['result']['condition']:.5f}",
        ]
        for (kind, framework), history in zip((name.split("-") for name in measured), measured.values(), strict=True)
    ]
    head = ["system", "weights", "condition", "largest difference", f"error after {terms[-1]:,} products"]
    between = np.max([_apart(group) for group in by_variant(measured).values()])
    return f"""\
Theorem 2 of the paper is about K Neumann products, and about K + 1 steps of gradient descent from the optimum. Both
give the same hypergradient. Both tend to the implicit hypergradient, by a factor of at most 1 − αμ for each product.
Here α is 1/λmax, and all numbers are in float64. Each system is solved until the norm of its gradient is below 1e-10.

- *Difference*: between the hypergradients of the series and of the unrolled steps. The table has the largest one over
  K from {terms[0]} to {terms[-1]:,}.
- *Error*: the distance from the implicit hypergradient by the dense Hessian.

Both are relative to the norm of the implicit hypergradient.

{table([*head, "factor seen", "1 − αμ"], lines)}
{draw(pictures / "theorem.png", (9, 3.6), lambda figure: _fill(figure, measured))}
The two agree to rounding and to the accuracy of the optimum, at each K. The error of v stays below its bound,
(1 − αμ)^(K+1), at each K and in each system. The table shows the factor of the last products. The exact hypergradient
is the same in {", ".join(frameworks)}, to {between:.0e} of its norm. It agrees with central differences to 1e-5, for
which the inner problem is solved again. A step of 2.1/λmax is reported as `DIVERGED`, and a step of 1.9/λmax converges.
The paper has no experiment on this.
"""


def _measured(histories: Histories) -> Histories:
    return {name: history for name, history in histories.items() if "rows" in history}


def _frameworks(histories: Histories) -> list[str]:
    names = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX"}
    return [text for name, text in names.items() if any(known.endswith(name) for known in histories)]


def _rate(history: dict[str, Any]) -> float:
    """Return the factor by which the error falls with each of the last products above rounding."""
    before, last = [row for row in history["rows"] if row["error"] > 1e-12][-2:]
    return float((last["error"] / before["error"]) ** (1 / (last["terms"] - before["terms"])))


def _apart(group: list[dict[str, Any]]) -> float:
    """Return the largest relative distance between the exact hypergradients of several frameworks."""
    first, *others = (np.array(history["hypergradient"]) for history in group)
    return max((np.linalg.norm(other - first) / np.linalg.norm(first) for other in others), default=0.0)


def _fill(figure: Any, measured: Histories) -> None:
    left, right = figure.subplots(1, 2)
    marks = {"numpy": "o", "torch": "x", "jax": "+"}
    colours = {"quadratic": "tab:blue", "network": "tab:orange"}
    drawn = set()
    for name, history in measured.items():
        kind, framework = name.split("-")
        columns = {key: [row[key] for row in history["rows"]] for key in history["rows"][0]}
        steps, colour = [terms + 1 for terms in columns["terms"]], colours[kind]
        shown = np.maximum(columns["difference"], 1e-17)  # on a logarithmic axis
        left.loglog(steps, shown, marks[framework], color=colour, label=name.replace("-", ", "))
        if kind not in drawn:  # the frameworks agree
            right.loglog(steps, columns["error"], "-", color=colour, label=f"{kind}: hypergradient")
            right.loglog(steps, columns["adjoint_error"], "--", color=colour, label=f"{kind}: v")
            right.loglog(steps, columns["bound"], ":", color=colour, label=f"{kind}: bound on v")
        drawn.add(kind)
    left.set(title="Series against unrolled steps", xlabel="K + 1", ylabel="relative difference", ylim=(3e-18, 1e-6))
    right.set(title="Series against the implicit derivative", xlabel="K + 1", ylabel="relative error", ylim=(1e-17, 3))
    left.legend(fontsize=8)
    right.legend(fontsize=8)

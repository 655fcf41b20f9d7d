"""Figure 9: test accuracy against the share of data that is held out for validation."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.common import by_variant, draw, table

KINDS = {
    "few": "one weight decay",
    "many": "one per weight",
    "many_cg": "one per weight, CG",
    "config": "one per weight, --config",
}
FITS = {"test": "as tuned", "retrained": "re-trained on all"}


def row(histories: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, the paper's figures, and ours."""
    runs = by_variant(histories)
    largest = max(points(name) for name in runs)
    ours = ", ".join(f"{best(runs[f'{kind}-{largest}'], 'test'):.0%} with {KINDS[kind]}" for kind in ("few", "many"))
    return (
        "How much to hold out",
        "best share to hold out: about 10% with few hyperparameters, 25% to 50% with many (second-hand)",
        f"of {largest:,} images: {ours}",
    )


def section(histories: dict[str, Any], pictures: Path) -> str:
    """Return the section."""
    runs = by_variant(histories)
    order = sorted(runs, key=lambda name: (points(name), list(KINDS).index(kind(name))))
    first = next(iter(histories.values()))
    settings, shares = first["settings"], first["settings"]["shares"]
    rows = [
        [f"{points(name):,}", KINDS[kind(name)], said, *cells(runs[name], fit)]
        for name in order
        for fit, said in FITS.items()
    ]
    count = max(history["result"]["hyperparameters"] for history in histories.values())
    seeds = len(next(iter(runs.values())))
    return "\n".join(
        [
            f"A logistic regression on {settings['data']}. A share of its n images is held out. The weight decay, one "
            f"number or {count:,} numbers, is tuned on this share while the model trains. The adjoint is the gradient "
            f"itself (`identity`), as in the paper. The table has the test accuracy by the share held out, as mean ± "
            f"standard deviation over {seeds} seeds. With a share of 0 %, nothing is tuned:",
            "",
            table(["n", "weight decay", "weights", *(f"{share:.0%}" for share in shares)], rows),
            draw(pictures / "validation_split.png", (9, 3.8), lambda figure: fill(figure, runs, order)),
            "\n\n".join(findings(runs, order)),
            "",
            f"Scaled down: the images are from the first 10,000 training images of MNIST. There are "
            f"{settings['outer_steps'] * settings['inner_steps']:,} steps of descent on all data, where the paper has "
            f"250 epochs of batches. The data set has {len({points(name) for name in runs})} sizes, and in the paper "
            "three (100, 200, 1,600). Decays stay below 1 / learning rate, because descent is unstable above it. "
            f"All start at exp({settings['start']:.0f}).",
        ]
    )


def findings(runs: dict[str, list], order: list[str]) -> list[str]:
    """Return what the table says, in words that follow from its numbers."""
    said = []
    for n in sorted({points(name) for name in order}):
        few, many = runs[f"few-{n}"], runs[f"many-{n}"]
        last, untuned = mean(few, "test")[-1], mean(few, "test")[0]
        more = mean(many, "test")[-1]
        tuned = max(max(mean(runs[name], fit)[1:]) for name in order if points(name) == n for fit in FITS)
        said.append(
            f"**{n:,} images.** Before re-training, the best share to hold out is {best(few, 'test'):.0%} with one "
            f"decay and {best(many, 'test'):.0%} with one per weight. After re-training, it is "
            f"{best(few, 'retrained'):.0%} and {best(many, 'retrained'):.0%}. At the largest share, without "
            "re-training, many decays are "
            f"{'better' if more > last else 'no better'} than one: {more:.3f} and {last:.3f}. The best of all tuned "
            f"cells is {tuned:.3f}. Without tuning, which may use all images, it is {untuned:.3f}. The difference is "
            + ("within" if abs(tuned - untuned) < deviation(few)[0] else "more than")
            + " one standard deviation over seeds."
        )
    solved = [name for name in order if kind(name) == "many_cg"]
    if solved:
        steps = [history["settings"]["outer_steps"] * sum(share > 0 for share in history["settings"]["shares"])
                 for name in solved for history in runs[name]]  # fmt: skip
        unsolved = sum(row["unsolved"] for name in solved for history in runs[name] for row in history["rows"])
        gaps = [
            np.abs(mean(runs[name], fit) - mean(runs[name.replace("_cg", "")], fit)) for name in solved for fit in FITS
        ]
        said.append(
            f"Ten steps of damped CG in place of the identity change no cell by more than {np.max(gaps):.3f}. In "
            f"{unsolved / sum(steps):.0%} of the hyperparameter steps, ten did not reach the tolerance."
        )
    return said


def fill(figure: Figure, runs: dict[str, list], order: Iterable[str]) -> None:
    """Draw the curves."""
    sizes = sorted({points(name) for name in order})
    for axes, n in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for name in (name for name in order if points(name) == n):
            colour = f"C{list(KINDS).index(kind(name))}"
            shares = [row["share"] for row in runs[name][0]["rows"]]
            for fit, style in zip(FITS, ("-o", "--"), strict=True):
                label = f"{KINDS[kind(name)]}, {FITS[fit]}"
                axes.plot(shares, mean(runs[name], fit), style, color=colour, markersize=4, label=label)
                low, high = (
                    mean(runs[name], fit) - deviation(runs[name], fit),
                    mean(runs[name], fit) + deviation(runs[name], fit),
                )
                if fit == "test":
                    axes.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(title=f"{n:,} images", xlabel="share held out for validation", ylabel="test accuracy")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")


def points(name: str) -> int:
    """Return how many images a variant has."""
    return int(name.rpartition("-")[2])


def kind(name: str) -> str:
    """Return a variant's kind of weight decay."""
    return name.rpartition("-")[0]


def values(histories: list, fit: str) -> np.ndarray:
    """Return accuracies by seed and share."""
    return np.array([[row[fit] for row in history["rows"]] for history in histories])


def mean(histories: list, fit: str) -> np.ndarray:
    """Return mean accuracies over seeds, by share."""
    return values(histories, fit).mean(0)


def deviation(histories: list, fit: str = "test") -> np.ndarray:
    """Return standard deviations over seeds, by share; 0 for a single seed."""
    return values(histories, fit).std(0, ddof=min(1, len(histories) - 1))


def cells(histories: list, fit: str) -> list[str]:
    """Return the cells of a line of the table."""
    return [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean(histories, fit), deviation(histories, fit), strict=True)]


def best(histories: list, fit: str) -> float:
    """Return the best share of those that hold something out."""
    return histories[0]["rows"][1 + int(mean(histories, fit)[1:].argmax())]["share"]

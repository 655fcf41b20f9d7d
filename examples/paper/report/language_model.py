"""Table 4: perplexity of a language model by what tuned its regularizers."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.common import by_variant, draw, mean, spread, table

NAMES = {
    "none": "no tuning",
    "random": "random search",
    "few": "few, identity",
    "many": "many, identity",
    "many_neumann": "many, 1 Neumann term",
    "config": "many, --config",
}
RATES = {"input": "dropout, input", "output": "dropout, output", "recurrent": "DropConnect"}


def row(histories: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, the paper's figures, and ours."""
    runs = variants(histories)
    count = runs["many"][0]["result"]["hyperparameters"]
    ours = "; ".join(
        f"{mean(runs[name], 'choose'):.1f} {said}"
        for name, said in (("none", "without tuning"), ("many", f"with {count:,}"), ("random", "by random search"))
    )
    return (
        "A language model",
        "validation perplexity 75.72 without tuning, 68.18 with 1,691,951 hyperparameters (second-hand)",
        ours,
    )


def section(histories: dict[str, Any], pictures: Path) -> str:
    """Return the section."""
    runs = variants(histories)
    settings = runs["none"][0]["settings"]
    trials = sum(name.startswith("random") for name in by_variant(histories))
    seeds = len(runs["none"])
    weights = runs["none"][0]["result"]["weights"]
    rows = [
        [
            NAMES[name],
            f"{found[0]['result']['hyperparameters']:,}" if name != "none" else "0",
            *(spread(found, key, ".2f") for key in ("tune", "choose", "test")),
            spread(found, "epoch", ".1f"),
            f"{np.mean([history['cpu_seconds'] for history in found]):.0f}",
        ]
        for name, found in runs.items()
    ]
    head = ["tuned by", "hyperparameters", "tuned on", "validation", "test", "best epoch", "CPU seconds"]
    return "\n".join(
        [
            f"An LSTM of {settings['size']} units with tied embeddings, {weights:,} weights, on {settings['train']:,} "
            f"words of {settings['data']}. The table has perplexities at the epoch that is best on validation. They "
            f"are means over {seeds} seed{'s' * (seeds > 1)}. Another text is for tuning. Random search keeps the "
            f"best of {trials} runs by validation. Its time includes all runs:",
            "",
            table(head, rows),
            draw(pictures / "language_model.png", (9, 3.8), lambda figure: fill(figure, runs)),
            " ".join(findings(runs)),
            "",
            f"Scaled down: the vocabulary has {settings['vocabulary']:,} words, and there is one layer. The paper has "
            f"Penn Treebank, 10,000 words and two layers of 650 units. Here, Adam takes {settings['epochs']} epochs on "
            f"windows of {settings['window']} words, each from a state of zero. The hyperparameters take a step after "
            f"every {settings['every']} steps of training, and in the paper after each. One layer has 5 scalar "
            f"regularizers, and the paper's two layers have 7. All start at a dropout of {settings['rates']['input']} "
            f"and penalties of {settings['rates']['slowness']}. 'No tuning' stays there.",
        ]
    )


def findings(runs: dict[str, list]) -> list[str]:
    """Return what the table says, in words that follow from its numbers."""
    none, tests = mean(runs["none"], "test"), {name: mean(found, "test") for name, found in runs.items()}
    first = min(tests, key=tests.__getitem__)
    said = [f"'{NAMES[first]}' has the best test perplexity, {tests[first]:.2f}, against {none:.2f} without tuning."]
    changes = "; ".join(f"{NAMES[name]}: {tests[name] - none:+.2f}" for name in tests if name != "none")
    said.append(f"Changes against no tuning, in test perplexity: {changes}.")
    better = tests["many"] < tests["random"]
    said.append(
        f"A random search of a few runs is {'behind' if better else 'ahead of'} many tuned hyperparameters here."
        + ("" if better else " It draws from a wide range of rates. Tuning starts at small rates, and takes few steps.")
    )
    for name in ("few", "many"):
        rates = ", ".join(f"{mean(runs[name], f'{key}_rate'):.2f} ({RATES[key]})" for key in RATES)
        said.append(f"Mean rates at the best epoch of {NAMES[name]}: {rates}.")
    start, end = (np.mean([history["rows"][i]["input_rate"] for history in runs["few"]]) for i in (0, -1))
    if end < start and not better:
        said.append(
            f"The rates may show a reason. The rate at the input ends at {end:.3f}, and the best random runs have "
            f"{mean(runs['random'], 'input_rate'):.2f}. Early in training, noise costs more than it gains, and a "
            "hypergradient looks only at the present weights. Near zero, relaxed dropout has a small gradient, so the "
            "rate hardly comes back. We have not tested this explanation."
        )
    return said


def fill(figure: Figure, runs: dict[str, list]) -> None:
    """Draw perplexities, and rates while they are tuned."""
    left, right = figure.subplots(1, 2)
    for i, (name, found) in enumerate(runs.items()):
        left.plot(*curve(found, "choose"), "-o", color=f"C{i}", markersize=3, label=NAMES[name])
    lowest = min(min(curve(found, "choose")[1]) for found in runs.values())
    left.set(xlabel="epoch", ylabel="validation perplexity", ylim=(0.97 * lowest, 1.4 * lowest))
    for i, (name, said) in enumerate(RATES.items()):
        right.plot(*curve(runs["many"], f"{name}_rate"), color=f"C{i}", label=f"{said}, many (mean)")
        right.plot(*curve(runs["few"], f"{name}_rate"), "--", color=f"C{i}", label=f"{said}, few")
    right.set(xlabel="epoch", ylabel="rate", ylim=(0, 1.5 * right.get_ylim()[1]))  # room for the legend
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def variants(histories: dict[str, Any]) -> dict[str, list]:
    """Return histories by variant, the trials of a random search as one of the best by validation."""
    runs = by_variant(histories)
    trials = [runs.pop(name) for name in list(runs) if name.startswith("random")]
    runs["random"] = [
        {
            **min(of_seed, key=lambda history: history["result"]["choose"]),
            "cpu_seconds": sum(history["cpu_seconds"] for history in of_seed),
        }
        for of_seed in zip(*trials, strict=True)
    ]
    return {name: runs[name] for name in NAMES if name in runs}


def curve(histories: list, key: str) -> tuple[list, np.ndarray]:
    """Return epochs, and the mean of a number over seeds."""
    epochs = [row["epoch"] for row in histories[0]["rows"]]
    return epochs, np.mean([[row[key] for row in history["rows"]] for history in histories], 0)

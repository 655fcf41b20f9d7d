"""Table 4: perplexity of a language model by what tuned its regularizers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from report.common import by_variant, draw, mean, spread, table

NAMES = {
    "none_low": "no tuning, low start",
    "none": "no tuning, high start",
    "few": "few, identity",
    "many": "many, identity",
    "config": "many, --config",
    "random": "random search",
    "halving": "successive halving",
}
RATES = {"input": "dropout, input", "output": "dropout, output", "recurrent": "DropConnect"}
TARGET = 0.1  # the paper's gain over no tuning, second-hand
Runs = dict[str, list[dict[str, Any]]]


def row(histories: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, the paper's figures, and ours."""
    runs = variants(histories)
    count = runs["many"][0]["result"]["hyperparameters"]
    ours = (
        f"{mean(runs['none_low'], 'choose'):.1f} without tuning; {mean(runs['many'], 'choose'):.1f} with {count:,}; "
        f"{mean(runs['random'], 'choose'):.1f} by random search, {mean(runs['halving'], 'choose'):.1f} by halving"
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
    low, high = (said_start(runs[name][0]["settings"]["start"]) for name in ("none_low", "none"))
    weights = runs["none"][0]["result"]["weights"]
    lines = [cells(name, found) for name, found in runs.items()]
    head = ["tuned by", "hyperparameters", "validation", "test", "best epoch", "trained again, test", "CPU seconds"]
    rungs = ", ".join(f"{kept} to {epochs}" for kept, epochs in runs["halving"][0]["settings"]["rungs"])
    return f"""\
An LSTM of {settings["size"]} units with tied embeddings, {weights:,} weights, on {settings["train"]:,} words of
{settings["data"]}. The table has perplexities at the epoch that is best on validation. They are
means ± standard deviations over {counts(runs)}. Another text is for tuning.

- *Low start*: {low}.
- *High start*: {high}.
  Runs with another seed chose it. Tuned runs start there.
- *Few*: 5 scalars. *Many*: a rate for each unit, and for each weight of the recurrent matrix.
- *Random search* trains with {len(runs["random"][0]["trials"])} draws, and keeps the best by validation.
- *Successive halving* trains {rungs} epochs, and always goes on with the best. It draws as random search does.
- *Trained again*: a training from new weights with the rates at the end of the tuning.

{table(head, lines)}
{draw(pictures / "language_model.png", (9, 3.8), lambda figure: fill(figure, runs))}
The next table compares with both searches. Random search has as many trainings as fit into the same CPU time, rounded
up. A second training counts. Differences are in test perplexity, with standard errors over the seeds. A negative
difference is a better tuned run:

{comparison(runs)}
{" ".join(findings(runs))}

Scaled down: the vocabulary has {settings["vocabulary"]:,} words, and there is one layer. The paper has
Penn Treebank, 10,000 words and two layers of 650 units. Here, Adam takes {settings["epochs"]} epochs on
windows of {settings["window"]} words, each from a state of zero. The hyperparameters take a step after
every {settings["every"]} steps of training, and in the paper after each. One layer has 5 scalar
regularizers, and the paper's two layers have 7."""


def said_start(start: dict[str, float]) -> str:
    """Return the first rates and penalties in words."""
    rates = ", ".join(f"{start[name]:g} ({said})" for name, said in RATES.items())
    return f"{rates}, penalties of {start['activation']:g} (activation) and {start['slowness']:g} (slowness)"


def counts(runs: Runs) -> str:
    """Return the number of seeds, and the variants that have fewer."""
    most = max(map(len, runs.values()))
    fewer = [f"{NAMES[name]}: {len(found)}" for name, found in runs.items() if len(found) < most]
    return f"{most} seed{'s' * (most > 1)}" + (f" ({'; '.join(fewer)})" if fewer else "")


def cells(name: str, found: list[dict[str, Any]]) -> list[str]:
    """Return a line of the table."""
    again = "again_test" in found[0]["result"]
    tuned = name not in ("none_low", "none")
    return [
        NAMES[name],
        f"{found[0]['result']['hyperparameters']:,}" if tuned else "0",
        *(spread(found, key, ".2f") for key in ("choose", "test")),
        spread(found, "epoch", ".1f"),
        spread(found, "again_test", ".2f") if again else "",
        f"{np.mean([history['cpu_seconds'] for history in found]):.0f}",
    ]


def search_of(history: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the best of as many trials of a random search as take so many seconds, rounded up, or of all."""
    trials = history["trials"]
    number = max(1, math.ceil(seconds / np.mean([trial["cpu_seconds"] for trial in trials])))
    return min(trials[:number], key=lambda trial: trial["choose"]) | {"trials": min(number, len(trials))}


def differences(runs: Runs, name: str, key: str) -> dict[str, Any]:
    """Return the differences in test perplexity between a tuned variant and each other one, for each seed."""
    pairs = list(zip(runs[name], runs["none_low"], runs["none"], runs["random"], runs["halving"], strict=False))
    again = key.startswith("again")
    found: dict[str, Any] = {"low": [], "high": [], "random": [], "halving": [], "trials": []}
    for tuned, low, high, random, halving in pairs:
        seconds = tuned["cpu_seconds"] + (tuned["again_cpu_seconds"] if again else 0)
        search = search_of(random, seconds)
        others = {"low": low["result"], "high": high["result"], "random": search, "halving": halving["result"]}
        for other, result in others.items():
            found[other].append(tuned["result"][key] - result["test"])
        found["trials"].append(search["trials"])
    return found


def comparison(runs: Runs) -> str:
    """Return a table: each tuned variant less random search in its time, halving, and no tuning."""
    head = ["tuned by", "no tuning, low", "no tuning, high", "random search", "its trainings", "successive halving"]
    lines = []
    for name in learned(runs):
        for key, how in (("test", ""), ("again_test", ", trained again")):
            found = differences(runs, name, key)
            trials = found["trials"]
            span = f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)} to {max(trials)}"
            low, high, random, halving = (_error(found[other]) for other in ("low", "high", "random", "halving"))
            lines.append([NAMES[name] + how, low, high, random, span, halving])
    return table(head, lines)


def learned(runs: Runs) -> list[str]:
    """Return the variants that are tuned by hypergradients."""
    return [name for name in runs if name not in ("none_low", "none", "random", "halving")]


def findings(runs: Runs) -> list[str]:
    """Return what the tables say, in words that follow from their numbers."""
    scores = {(name, "test"): mean(found, "test") for name, found in runs.items()}
    scores |= {(name, "again_test"): mean(runs[name], "again_test") for name in learned(runs)}
    most = max(map(len, runs.values()))
    full = {k: v for k, v in scores.items() if k[0] in learned(runs) and len(runs[k[0]]) == most}  # with all seeds
    (name, key), best = min(full.items(), key=lambda item: item[1])
    called = NAMES[name] + (", trained again" if key != "test" else "")
    found, low = differences(runs, name, key), mean(runs["none_low"], "test")
    gain = 1 - best / low
    said = [
        f"The best tuned variant with all seeds is '{called}', with a test perplexity of {best:.2f}.",
        f"This is {gain:.1%} below no tuning with the low start, "
        + ("at least" if gain >= TARGET else "less than")
        + f" the paper's {TARGET:.0%}.",
    ]
    others = {"high": "no tuning from the same start", "random": "random search in the same time"}
    for other, words in (others | {"halving": "successive halving"}).items():
        said.append(f"Against {words}, it is {_judged(found[other])}.")
    first, middle, last = (_rate(runs["few"], "input", part) for part in (0.0, 0.5, 1.0))
    said.append(
        f"With '{NAMES['few']}', the dropout at the input goes from {first:.2f} to {middle:.2f} at half time, and to "
        f"{last:.2f} at the end."
    )
    if last < 0.5 * first:
        said.append(
            "So few rates fall from a high start, too, and a small gradient near zero does not explain it. A likely "
            "reason: early in training, noise costs more than it gains. A hypergradient sees only the present weights."
        )
    start, end = (_rate(runs["many"], "input", part) for part in (0.0, 1.0))
    said.append(f"With '{NAMES['many']}', the mean dropout at the input goes from {start:.2f} to {end:.2f}.")
    high = mean(runs["none"], "test")
    if high < low:
        said.append(
            f"The high start alone, without tuning, has {high:.2f}, where the low start has {low:.2f}. So the start "
            f"gives {min(1, (low - high) / (low - best)):.0%} of the gain of the best tuned variant."
        )
    return said


def _rate(found: list[dict[str, Any]], key: str, part: float) -> float:
    """Return the mean of a rate over seeds after a part of the training."""
    if part == 0:
        return found[0]["settings"]["start"][key]
    at = round(part * len(found[0]["rows"])) - 1
    return float(np.mean([history["rows"][at][f"{key}_rate"] for history in found]))


def _judged(values: list[float]) -> str:
    middle, error = float(np.mean(values)), _standard_error(values)
    if abs(middle) <= error:
        return f"equal within the standard error ({_error(values)})"
    return f"{'better' if middle < 0 else 'worse'} by more than the standard error ({_error(values)})"


def _standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.inf


def _error(values: list[float]) -> str:
    error = _standard_error(values)
    return f"{np.mean(values):+.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def fill(figure: Figure, runs: Runs) -> None:
    """Draw perplexities, and rates while they are tuned."""
    left, right = figure.subplots(1, 2)
    for i, (name, found) in enumerate(runs.items()):
        left.plot(*curve(found, "choose"), "-o", color=f"C{i}", markersize=3, label=NAMES[name])
    lowest = min(min(curve(found, "choose")[1]) for found in runs.values())
    left.set(xlabel="epoch", ylabel="validation perplexity", ylim=(0.97 * lowest, 1.4 * lowest))
    for i, (name, said) in enumerate(RATES.items()):
        for variant, style in (("many", "-"), ("few", "--")):
            found = runs[variant]
            rates = [found[0]["settings"]["start"][name], *curve(found, f"{name}_rate")[1]]
            right.plot(range(len(rates)), rates, style, color=f"C{i}", label=f"{said}, {NAMES[variant].split(',')[0]}")
    right.set(xlabel="epoch", ylabel="rate", ylim=(0, 1.6 * right.get_ylim()[1]))  # room for the legend
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)


def variants(histories: dict[str, Any]) -> Runs:
    """Return histories by variant, in the order of NAMES."""
    runs = by_variant(histories)
    return {name: runs[name] for name in NAMES if name in runs}


def curve(histories: list[dict[str, Any]], key: str) -> tuple[list[float], np.ndarray]:
    """Return epochs, and the mean of a number over seeds."""
    epochs = [row["epoch"] for row in histories[0]["rows"]]
    return epochs, np.mean([[row[key] for row in history["rows"]] for history in histories], 0)

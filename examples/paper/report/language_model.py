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
    "many": "many, from the start",
    "few_late": "few, second half",
    "many_late": "many, second half",
    "config": "many, second half, --config",
    "random": "random search",
    "halving": "successive halving",
}
RATES = {"input": "dropout, input", "output": "dropout, output", "recurrent": "DropConnect"}
PENALTIES = {"activation": "penalty, activation", "slowness": "penalty, slowness"}
TARGET = 0.1  # the paper's gain over no tuning, second-hand
LATE = "many_late"  # the variant that runs with other seeds chose
EARLY = 2  # epochs at the start, whose derivatives are large and noisy
Runs = dict[str, list[dict[str, Any]]]


def row(histories: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, the paper's figures, and ours."""
    runs = variants(histories)
    count = runs[LATE][0]["result"]["hyperparameters"]
    ours = (
        f"{mean(runs['none_low'], 'choose'):.1f} without tuning; {mean(runs[LATE], 'choose'):.1f} with {count:,}; "
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
    head = ["tuned by", "hyperparameters", "validation", "test", "best epoch", "CPU seconds"]
    rungs = ", ".join(f"{kept} to {epochs}" for kept, epochs in runs["halving"][0]["settings"]["rungs"])
    return f"""\
An LSTM of {settings["size"]} units with tied embeddings, {weights:,} weights, on {settings["train"]:,} words of
{settings["data"]}. The table has perplexities at the epoch that is best on validation. They are
means ± standard deviations over {counts(runs)}. Another text is for tuning. The searches do
not use it.

- *Low start*: {low}.
- *High start*: {high}.
  Runs with another seed chose it. Tuned runs start there.
- *Few*: 5 scalars. *Many*: a rate for each unit, and for each weight of the recurrent matrix. Both by the identity.
- *Second half*: the rates stay at the high start for half of the training. Then each hypergradient changes them.
  Runs with seeds 5 and 6 chose this.
- *Random search* trains with {len(runs["random"][0]["trials"])} draws, and keeps the best by validation.
- *Successive halving* trains {rungs} epochs, and always goes on with the best. It draws as random search does.

{table(head, lines)}
{draw(pictures / "language_model.png", (9, 3.8), lambda figure: fill(figure, runs))}
The next table compares with both searches. Random search has as many trainings as fit into the same CPU time, rounded
up. Differences are in test perplexity, with standard errors over the seeds. A negative difference means that the
tuned run is better:

{comparison(runs)}
{chr(10).join(f"- {said}" for said in findings(runs))}

{derivatives(by_variant(histories).get("derivative", []))}
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
    tuned = name not in ("none_low", "none")
    return [
        NAMES[name],
        f"{found[0]['result']['hyperparameters']:,}" if tuned else "0",
        *(spread(found, key, ".2f") for key in ("choose", "test")),
        spread(found, "epoch", ".1f"),
        f"{np.mean([history['cpu_seconds'] for history in found]):.0f}",
    ]


def search_of(history: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the best of as many trials of a random search as take so many seconds, rounded up, or of all."""
    trials = history["trials"]
    number = max(1, math.ceil(seconds / np.mean([trial["cpu_seconds"] for trial in trials])))
    return min(trials[:number], key=lambda trial: trial["choose"]) | {"trials": min(number, len(trials))}


def differences(runs: Runs, name: str) -> dict[str, Any]:
    """Return the differences in test perplexity between a tuned variant and each other one, for each seed."""
    pairs = list(zip(runs[name], runs["none_low"], runs["none"], runs["random"], runs["halving"], strict=False))
    found: dict[str, Any] = {"low": [], "high": [], "random": [], "all": [], "halving": [], "trials": []}
    for tuned, low, high, random, halving in pairs:
        search = search_of(random, tuned["cpu_seconds"])
        others = {"low": low["result"], "high": high["result"], "random": search, "all": random["result"]}
        for other, result in (others | {"halving": halving["result"]}).items():
            found[other].append(tuned["result"]["test"] - result["test"])
        found["trials"].append(search["trials"])
    return found


def comparison(runs: Runs) -> str:
    """Return a table: each tuned variant less random search in its time and in all, halving, and no tuning."""
    number = len(runs["random"][0]["trials"])
    head = ["tuned by", "no tuning, low", "no tuning, high", "random search, same time", "its trainings"]
    head += [f"random search, {number} trainings", "successive halving"]
    lines = []
    for name in learned(runs):
        found = differences(runs, name)
        trials = found["trials"]
        span = f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)} to {max(trials)}"
        low, high, random, whole, halving = (
            _error(found[other]) for other in ("low", "high", "random", "all", "halving")
        )
        lines.append([NAMES[name], low, high, random, span, whole, halving])
    return table(head, lines)


def learned(runs: Runs) -> list[str]:
    """Return the variants that are tuned by hypergradients."""
    return [name for name in runs if name not in ("none_low", "none", "random", "halving")]


def findings(runs: Runs) -> list[str]:
    """Return what the tables say, in words that follow from their numbers."""
    found, low, best = differences(runs, LATE), mean(runs["none_low"], "test"), mean(runs[LATE], "test")
    gain = 1 - best / low
    said = [
        f"'{NAMES[LATE]}' has a test perplexity of {best:.2f}. This is {gain:.1%} below no tuning with the low start, "
        f"{'at least' if gain >= TARGET else 'less than'} the paper's {TARGET:.0%}."
    ]
    number = len(runs["random"][0]["trials"])
    others = {"high": "no tuning from the same start", "random": "random search in the same time"}
    others |= {"all": f"all {number} trainings of random search", "halving": "successive halving"}
    said += [f"Against {words}, it is {_judged(found[other])}." for other, words in others.items()]
    said.append(
        "The high start by itself has "
        f"{mean(runs['none'], 'test'):.2f}, so the start gives {low - mean(runs['none'], 'test'):.2f} of the "
        f"{low - best:.2f} that '{NAMES[LATE]}' gains over the low start."
    )
    for name in [name for name in learned(runs) if name not in (LATE, "config") and len(runs[name]) > 1]:
        pairs = [a["result"]["test"] - b["result"]["test"] for a, b in zip(runs[LATE], runs[name], strict=False)]
        said.append(f"Against '{NAMES[name]}' ({len(pairs)} seeds), it is {_judged(pairs)}.")
    half, end = (_rate(runs[LATE], "slowness", part) for part in (0.5, 1.0))
    said.append(
        f"With '{NAMES[LATE]}', the penalty on slowness goes from {half:.2f} to {end:.2f}, and the mean dropout at the "
        f"output from {_rate(runs[LATE], 'output', 0.5):.2f} to {_rate(runs[LATE], 'output', 1.0):.2f}."
    )
    return said


def derivatives(found: list[dict[str, Any]]) -> str:
    """Return a table of the derivative of the whole run and of the hypergradients on the way, and what it says."""
    if not found:
        return ""
    epochs = len(found[0]["rows"])
    parts = {f"1 to {EARLY}": slice(EARLY), f"{EARLY + 1} to {epochs}": slice(EARLY, None)}
    head = ["rate", *(f"run, epochs {part}" for part in parts), *(f"identity, {part}" for part in parts)]
    lines, against, agreed = [], [], 0
    for name, said in (RATES | PENALTIES).items():
        runs = [_sums(found, f"{name}_derivative", part) for part in parts.values()]
        shares = [[value / len(range(epochs)[part]) for value in _sums(found, f"{name}_raised", part)]
                  for part in parts.values()]  # fmt: skip
        lines.append([said, *map(_each, runs), *(f"{np.mean(share):.0%}" for share in shares)])
        wanted = {value < 0 for value in runs[1]}
        agreed += len(wanted) == 1
        if len(wanted) == 1 and all((share > 0.5) not in wanted for share in shares[1]):
            against.append((said, wanted.pop()))
    seconds = np.mean([history["result"]["derivative_cpu_seconds"] for history in found])
    signs = " ".join(
        f"By the run, '{said}' should {'rise' if up else 'fall'}. The identity {'lowers' if up else 'raises'} it."
        for said, up in against
    )
    chance = len(lines) * 0.5 ** (len(found) - 1)
    if agreed < len(lines):
        signs += " So the derivative of one run is too noisy to show the right direction for each rate."
    return f"""\
A hypergradient on the way sees only the next step. `bl.metagradient` gives the derivative of the tuning loss after a
whole training by the rates of each epoch (high start, {epochs} epochs, 5 scalars). It takes {seconds:.0f} CPU
seconds. The next table has its sums over epochs, for each of {len(found)} seeds. If a sum is negative, a higher rate
lowers the loss at the end. The last columns are about the hypergradients on the way, by the identity. They have the
share of steps in which the hypergradient raises the rate.

{table(head, lines)}
After epoch {EARLY}, the sums of the run have the same sign in all seeds for {agreed} of {len(lines)} rates. In
{len(against)} of these, the identity has the other sign. Random signs would agree for {chance:.1f} rates.
{signs.strip()}
"""


def _sums(found: list[dict[str, Any]], key: str, part: slice) -> list[float]:
    """Return the sum of a number over some epochs, for each seed."""
    return [sum(row[key] for row in history["rows"][part]) for history in found]


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:+.2g}" for value in values)


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
    for i, name in enumerate(RATES):
        for variant, style in ((LATE, "-"), ("many", "--")):
            found = runs[variant]
            rates = [found[0]["settings"]["start"][name], *curve(found, f"{name}_rate")[1]]
            right.plot(range(len(rates)), rates, style, color=f"C{i}", label=f"{name}, {NAMES[variant].split(', ')[1]}")
    right.set(xlabel="epoch", ylabel="mean dropout", ylim=(0, 1.6 * right.get_ylim()[1]))  # room for the legend
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

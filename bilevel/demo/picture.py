"""The demo's picture: losses during tuning, and the penalty of each pixel."""

from pathlib import Path

import numpy as np

from bilevel.demo.search import Outcome


def save(outcome: Outcome, title: str, path: Path) -> None:
    """Write the picture as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    curves, image = figure.subplots(1, 2, width_ratios=(1.5, 1))

    for name, color in (("validation", "C0"), ("test", "C1")):
        losses = [getattr(score, f"{name}_loss") for score in outcome.scores]
        curves.plot(losses, color=color, marker="o", markersize=3, label=f"{name}, a penalty per weight")
        label = f"{name}, best shared penalty (grid search)"
        curves.axhline(getattr(outcome.shared, f"{name}_loss"), color=color, linestyle="--", label=label)
    curves.set_yscale("log")
    curves.yaxis.set_major_formatter("{x:g}")
    curves.yaxis.set_minor_formatter("{x:g}")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.set_xlabel("outer iteration")
    curves.set_ylabel("cross-entropy")
    curves.set_title("Loss")
    curves.legend(fontsize="small")
    curves.grid(alpha=0.3)

    logs = np.log10(outcome.pixel_penalties).mean(1).reshape(8, 8)
    shown = image.imshow(logs, cmap="viridis")
    image.set_xticks([])
    image.set_yticks([])
    image.set_title("Tuned penalty per pixel")
    figure.colorbar(shown, ax=image, label="log10, mean over the pixel's weights", shrink=0.85)
    figure.savefig(path, dpi=120)

"""Write docs/paper.md and its pictures from the histories in results/, and nothing else.

python examples/paper/page.py
"""

import json
import sys
from importlib import import_module
from pathlib import Path

from runs import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
SYSTEMS = [
    "theorem",
    "inversion",
    "overfit",
    "distillation",
    "augmentation",
    "magnitudes",
    "language_model",
    "reweighting",
    "validation_split",
    "cost",
    "successors",
]
INTRODUCTION = """\
# The paper's systems

This page repeats the experiments of Lorraine, Vicol & Duvenaud (AISTATS 2020) at a size for two CPU cores. Their paper
is "Optimizing Millions of Hyperparameters by Implicit Differentiation". `make paper DATA=DIR` makes the page and
its pictures from the histories in [`examples/paper/results`](../examples/paper/results). It also runs the systems that
have no history yet. Without data of your own, `--fast --out DIR` runs a system on data that scikit-learn brings. Some
figures of the paper are known to us second-hand only. The page marks them.

"""


def main() -> None:
    """Write the page."""
    pictures = DOCS / "paper"
    pictures.mkdir(exist_ok=True)
    rows, sections = ["| system | the paper | here | runs | command |", "|---|---|---|---|---|"], []
    for system in SYSTEMS:
        histories = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / system).glob("*.json"))}
        if not histories:
            continue
        report = import_module(f"report.{system}")
        title, paper, ours = report.row(histories)
        anchor = title.lower().replace(" ", "-").translate(str.maketrans("", "", ",.:()'"))
        rows.append(f"| [{title}](#{anchor}) | {paper} | {ours} | {len(histories)} | `examples/paper/{system}.py` |")
        sections.append(f"## {title}\n\n{report.section(histories, pictures).strip()}\n")
    (DOCS / "paper.md").write_text(INTRODUCTION + "\n".join(rows) + "\n\n" + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    print(*SYSTEMS) if sys.argv[1:] == ["--list"] else main()

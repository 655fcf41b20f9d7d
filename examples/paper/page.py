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

What Lorraine, Vicol & Duvenaud ("Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020)
did with hypergradients, done again with this library at a size that two CPU cores manage. `make paper DATA=DIR` makes
this page and its pictures from the histories in [`examples/paper/results`](../examples/paper/results), and runs what
has no history yet. Without data of your own, `--fast --out DIR` runs a system on data that scikit-learn brings. The
paper's figures are quoted as we know them; those that we have second-hand say so.

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

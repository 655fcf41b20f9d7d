"""Run the notebooks of docs/notebooks without Jupyter, and make pages of them.

    python .ci/site/notebooks.py [FILE.ipynb ...]

It runs the code cells and stores what they print and draw. Without arguments, it takes all notebooks. Like Jupyter, it
stores the open figures of matplotlib after each cell. It does not show the value of a last expression, so print it.
"""

import base64
import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
PICTURE = 40_000  # bytes, at most
DPI = 90
Cell = dict[str, Any]


def main(paths: list[str]) -> None:
    """Run notebooks, and store the outputs."""
    for path in [Path(name) for name in paths] or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        for cell, outputs in run(notebook):
            cell["outputs"] = outputs
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)


def run(notebook: dict[str, Any]) -> Iterator[tuple[Cell, list[dict[str, Any]]]]:
    """Run the code cells in one namespace. Yield each cell and its outputs in the format of notebooks."""
    import matplotlib.pyplot as plt

    plt.close("all")  # The caller's figures are no output of the first cell.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(text(cell["source"]), "a cell", "exec"), namespace)
        outputs: list[dict[str, Any]] = []
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
        for number in plt.get_fignums():
            outputs.append(
                {"data": {"image/png": png(plt.figure(number))}, "metadata": {}, "output_type": "display_data"}
            )
        plt.close("all")
        yield cell, outputs


def png(figure: Any) -> str:
    """Return a figure as text. Raise a ValueError if it is too large to be stored."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    if len(drawn.getvalue()) > PICTURE:
        raise ValueError(f"a picture has {len(drawn.getvalue()):,} bytes, and at most {PICTURE:,} are stored")
    return base64.b64encode(drawn.getvalue()).decode()


def as_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by the file names that the Markdown uses.

    The alternative text of a cell's pictures is ``alt`` in its metadata.
    """
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```{{.text .output}}\n{text(output['text']).rstrip()}\n```")
            else:
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![{cell['metadata']['alt']}]({picture})")
    title, rest = parts[0].partition("\n")[::2]
    download = f'<a href="{name}.ipynb" download>Download this notebook</a>'
    return "\n\n".join([title, download, rest.strip(), *parts[1:]]) + "\n", pictures


def text(lines: str | list[str]) -> str:
    """Return the text of a cell or an output, which a notebook may store as lines."""
    return lines if isinstance(lines, str) else "".join(lines)


if __name__ == "__main__":
    import matplotlib as mpl

    mpl.use("agg")
    main(sys.argv[1:])

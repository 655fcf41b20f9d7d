"""The notebooks run from top to bottom, and their stored outputs are what they print and draw."""

import base64
import json
import re
import struct

import notebooks
import pytest

FRAMEWORKS = {  # of each notebook
    "by-hand": [],
    "cleaning-labels": ["torch", "sklearn"],
    "distilling-digits": ["jax", "sklearn"],
    "failing-solve": ["torch"],
    "whole-run": ["torch", "sklearn"],
}
QUICK = ["by-hand"]
NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?")


def load(name):
    return json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text("utf-8"))


def shown(outputs):
    """Return printed words without numbers, which depend on the machine, and a mark for each picture."""
    return [
        " ".join(NUMBER.sub("#", notebooks.text(output["text"])).split()) if "text" in output else "picture"
        for output in outputs
    ]


def cells(*sources):
    return {"cells": [{"cell_type": "code", "metadata": {"alt": "a line"}, "source": source} for source in sources]}


def test_every_notebook_is_listed_here():
    assert sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb")) == sorted(FRAMEWORKS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FRAMEWORKS]
)
def test_a_notebook_prints_and_draws_what_it_has_stored(name):
    pytest.importorskip("matplotlib").use("agg")
    for framework in FRAMEWORKS[name]:
        pytest.importorskip(framework)
    for cell, outputs in notebooks.run(load(name)):
        assert shown(outputs) == shown(cell["outputs"]), notebooks.text(cell["source"])


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_notebook_is_short_and_its_pictures_have_alternative_texts(name):
    notebook = load(name)
    assert 8 <= len(notebook["cells"]) <= 20
    _, pictures = notebooks.as_page(notebook, name)  # a KeyError for a picture without an alternative text
    for picture in pictures.values():
        width, height = struct.unpack(">2I", picture[16:24])  # of a PNG
        assert len(picture) <= notebooks.PICTURE
        assert 200 <= width <= 800
        assert 50 <= height <= 500
    assert all(cell.get("execution_count") is None for cell in notebook["cells"])


def test_cells_share_a_namespace_and_outputs_are_stored_per_cell():
    pytest.importorskip("matplotlib").use("agg")
    pytest.importorskip("matplotlib.pyplot").figure()  # of the caller: not an output of the first cell
    sources = [
        "x = 2\nprint(x)",
        "import matplotlib.pyplot as plt\nax = plt.subplots(figsize=(3, 2))[1]",
        "print(x + 1)",
    ]
    first, second, third = (outputs for _, outputs in notebooks.run(cells(*sources)))
    assert first == [{"name": "stdout", "output_type": "stream", "text": ["2\n"]}]
    assert base64.b64decode(second[0]["data"]["image/png"]).startswith(b"\x89PNG")
    assert third[0]["text"] == ["3\n"]


def test_an_error_in_a_cell_and_a_large_picture_are_errors():
    pytest.importorskip("matplotlib").use("agg")
    with pytest.raises(ZeroDivisionError):
        list(notebooks.run(cells("1 / 0")))
    noise = (
        "import matplotlib.pyplot as plt, numpy as np\nax = plt.matshow(np.random.default_rng(0).random((999, 999)))"
    )
    with pytest.raises(ValueError, match=r"a picture has [\d,]+ bytes, and at most 40,000 are stored"):
        list(notebooks.run(cells(noise)))


def test_a_page_has_the_cells_the_outputs_and_a_download():
    notebook = cells("print(1)")
    picture = base64.b64encode(b"a picture").decode()
    notebook["cells"][0]["outputs"] = [
        {"output_type": "stream", "text": ["1\n", "\n"]},
        {"output_type": "display_data", "data": {"image/png": picture}},
    ]
    notebook["cells"].insert(0, {"cell_type": "markdown", "source": ["# Title\n", "\n", "Words."]})
    assert notebooks.as_page(notebook, "name") == (
        '# Title\n\n<a href="name.ipynb" download>Download this notebook</a>\n\nWords.\n\n'
        "```python\nprint(1)\n```\n\n```{.text .output}\n1\n```\n\n![a line](name-1.png)\n",
        {"name-1.png": b"a picture"},
    )

"""The paper's theorem 2, small, in each framework."""

from importlib.util import find_spec

import numpy as np
import pytest
from frameworks import paper

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.mark.parametrize("variant", paper("theorem").VARIANTS)
def test_neumann_products_are_unrolled_steps_from_the_optimum(variant, tmp_path):
    framework = variant.rpartition("-")[2]
    if not find_spec(framework):
        pytest.skip(f"{framework} is not installed")
    arguments = ["--fast", "--out", str(tmp_path), "--only", variant]
    histories = paper("theorem").main(arguments)
    history = histories[variant]
    assert all(row["difference"] < 1e-8 for row in history["rows"])
    assert all(row["adjoint_error"] <= row["bound"] for row in history["rows"])
    assert np.all(np.diff([row["error"] for row in history["rows"]]) < 0)
    assert history["result"]["above 2/λmax"] == "DIVERGED"
    assert paper("theorem").main(arguments) == histories

    report = paper("report.theorem")
    title, _, ours = report.row(histories)
    assert title.startswith("Theorem")
    assert ours.startswith("equal to")
    section = report.section(histories, tmp_path)
    assert f"| {variant.replace('-', ', ')} |" in section
    assert (tmp_path / "theorem.png").exists()


def test_a_config_chooses_the_solver(tmp_path):
    pytest.importorskip("torch")
    config = tmp_path / "solver.toml"
    config.write_text('[solver]\nname = "cg"\nrtol = 1e-8\n')
    arguments = ["--fast", "--out", str(tmp_path), "--only", "config", "--config", str(config)]
    assert paper("theorem").main(arguments)["config"]["result"]["error"] < 1e-6

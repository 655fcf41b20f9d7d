"""The paper's theorem 2, small, in each framework."""

from importlib.util import find_spec

import numpy as np
import pytest
from paper_systems import check_stored, paper, report_of

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.mark.parametrize("variant", paper("theorem").VARIANTS)
def test_neumann_products_are_unrolled_steps_from_the_optimum(system, variant, tmp_path):
    framework = variant.rpartition("-")[2]
    if not find_spec(framework):
        pytest.skip(f"{framework} is not installed")
    command = ["--fast", "--out", str(tmp_path), "--only", variant]
    histories = system.main(command)
    history = histories[variant]
    assert all(row["difference"] < 1e-8 for row in history["rows"])
    assert all(row["adjoint_error"] <= row["bound"] for row in history["rows"])
    assert np.all(np.diff([row["error"] for row in history["rows"]]) < 0)
    assert history["result"]["above 2/λmax"] == "DIVERGED"
    check_stored(system, command, histories)
    said = report_of(system, histories, tmp_path)
    assert said.startswith("| Theorem")
    assert " | equal to" in said
    assert f"| {variant.replace('-', ', ')} |" in said


def test_a_config_chooses_the_solver(system, tmp_path):
    pytest.importorskip("torch")
    config = tmp_path / "solver.toml"
    config.write_text('[solver]\nname = "cg"\nrtol = 1e-8\n')
    command = ["--fast", "--out", str(tmp_path), "--only", "config", "--config", str(config)]
    assert system.main(command)["config"]["result"]["error"] < 1e-6

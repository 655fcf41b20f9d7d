"""The speed benchmark runs, and its columns compute the same; no time is asserted."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = [name for name in ("torch", "jax") if find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    if not FRAMEWORKS:
        pytest.skip("neither torch nor jax is installed")
    file = tmp_path_factory.mktemp("speed") / "result.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()) | {"printed": done.stdout}


def records(result, kind):
    return [r for r in result["records"] if r["kind"] == kind]


def test_every_kind_of_record_is_there(result):
    expected = {"times", "memory", "overhead", "import"}
    expected |= {"syncs", "joint", "joint memory", "amortised"} if "torch" in FRAMEWORKS else set()
    expected |= {"compile"} if "jax" in FRAMEWORKS else set()
    assert {r["kind"] for r in result["records"]} == expected


def test_every_workload_is_timed_in_every_framework(result):
    from benchmarks.speed.sizes import WORKLOADS

    timed = {(r["framework"], r["workload"]) for r in records(result, "times")}
    assert timed == {(framework, workload) for framework in FRAMEWORKS for workload in WORKLOADS}


def test_every_column_computes_what_ours_does(result):
    from benchmarks.speed.measure import WRONG

    for record in records(result, "times"):
        for name, column in record["columns"].items():
            quartiles = column["seconds"]
            assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2], (record["workload"], name)
            assert name in ("plain step", "Betty") or column["error"] < WRONG, (record["workload"], name)
        assert record["columns"]["hand-written"]["ratio"] == [1.0, 1.0, 1.0]


def test_memory_is_measured(result):
    assert all(r["bytes"] > 0 for r in records(result, "memory"))


def test_the_table_has_every_target(result):
    rows = [line for line in result["printed"].splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert any("host syncs" in row for row in rows)


def test_markers_keep_the_rest_of_the_page():
    from benchmarks.speed.report import between_markers

    page = between_markers("# Results\n\nelse\n", "first\n", "cpu")
    page = between_markers(page + "\n## More\n", "second\n", "cpu")
    assert "else" in page
    assert "## More" in page
    assert "second" in page
    assert "first" not in page


def test_the_chart_shows_every_cell(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from benchmarks.speed import chart

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure))
    measured = json.loads((ROOT / "benchmarks" / "results" / "speed-cpu.json").read_text())
    chart.save(measured["records"], Path("chart.png"))
    for ax, framework in zip(drawn[0].axes, ("torch", "jax"), strict=True):
        cells = [r for r in records(measured, "times") if r["framework"] == framework]
        ours = next(line for line in ax.lines if line.get_label() == "ours")
        assert list(ours.get_xdata()) == [cell["columns"]["ours"]["ratio"][1] for cell in cells]
        assert len(ax.get_yticks()) == len(cells)

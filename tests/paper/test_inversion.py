"""Approximate inverse Hessians on diabetes, small."""

import numpy as np
import pytest
from paper_systems import check_stored, paper, report_of

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_cg_is_exact_after_as_many_products_as_weights(histories):
    history = histories["linear-diabetes-0"]
    assert history["result"]["weights"] == 11
    assert history["rows"][-1]["CG error"] < 1e-8
    neumann = [row["Neumann cosine"] for row in history["rows"]]
    assert np.all(np.diff(neumann) > 0)
    assert 0.5 < neumann[-1] < 0.95


def test_gauss_newton_is_the_hessian_of_a_linear_model_only(histories):
    for row in histories["linear-diabetes-0"]["rows"]:
        assert row["Gauss-Newton CG cosine"] == pytest.approx(row["CG cosine"], abs=1e-6)
    last = histories["network-diabetes-0"]["rows"][-1]
    assert last["Gauss-Newton CG cosine"] != pytest.approx(last["CG cosine"], abs=1e-6)


def test_failures_on_raw_features_are_flagged(histories):
    result = histories["raw-diabetes-0"]["result"]
    assert result["condition"] > 1e7
    assert result["unguarded 20 error"] > 1e10
    assert result["fixed step status"] == "DIVERGED"
    assert result["automatic step status"] == "CONVERGED"
    assert result["float32 CG status"] != "CONVERGED"
    assert result["float32 CG error"] > 0.1
    assert result["float64 CG status"] == "CONVERGED"
    assert result["float64 CG error"] < 1e-4


def test_damped_cg_reaches_the_damped_inverse_in_the_middle_of_a_training(histories):
    for row in histories["midway-diabetes-0"]["rows"]:
        assert row["least"] < 0
        assert row["damped CG 20, inverse"] > 0.99
        assert row["damped Neumann 20, inverse"] > row["identity, inverse"]


def test_the_derivative_of_the_run_is_that_of_differences():
    midway, regression = paper("midway"), paper("regression")
    start = regression.begin("network", None, 2, 0)

    def loss(log_decay):
        params = start.params
        for _ in range(8):
            params = midway.descend(midway.free(params), log_decay, start.train)
        return regression.outer(params, log_decay, *start.validation).item()

    training = midway.training_of(start, [3, 8])
    found = midway.bl.metagradient(training, start.params, start.log_decay, [start.train], steps=8)
    last = {name: grad[-1] for name, grad in found.grad.items()}
    direction = {name: torch.ones_like(leaf) for name, leaf in start.log_decay.items()}
    up, down = ({n: d + s * 1e-4 * direction[n] for n, d in start.log_decay.items()} for s in (1, -1))
    assert sum(float(grad.sum()) for grad in last.values()) == pytest.approx((loss(up) - loss(down)) / 2e-4, rel=1e-5)


def test_a_step_that_is_too_large_is_refused(system):
    import bilevel as bl

    regression = paper("regression")
    train, validation, params, log_decay = regression.prepare("raw", None, 0, 0)
    solver = bl.Neumann(step_size=system.STEP)
    data = {"inner_args": train, "outer_args": validation}
    with pytest.raises(bl.SolverError, match="diverged"):
        bl.hypergradient(regression.PROBLEM, params, log_decay, solver=solver, on_failure="raise", **data)


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    said = report_of(system, histories, tmp_path)
    assert said.startswith("| Approximate inversion | ")
    assert "| tanh network, diabetes |" in said
    assert "5 Neumann terms are ahead of 5 steps of CG" in said

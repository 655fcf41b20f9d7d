"""The paper's successors on breast cancer, small."""

import numpy as np
import pytest
from paper_systems import check_stored, report_of

pytest.importorskip("torch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_all_methods_lower_the_validation_loss_but_not_below_the_reference(system, histories):
    data = system.split(None, 0)
    start = np.full(data.train[0].shape[1], system.START)
    w = system.optimum(start, np.zeros_like(start), *data.train)
    untuned, best = system.PROBLEM.outer(w, start, *data.validation), histories["reference-0"]["result"]
    for name, history in histories.items():
        assert best["validation loss"] - 1e-4 < history["result"]["validation loss"], name
        if name != "soba-0":  # its one step of descent is too few for so ill-conditioned data
            assert history["result"]["validation loss"] < 0.8 * untuned, name


def test_better_solvers_give_better_hypergradients(histories):
    results = {name: history["result"] for name, history in histories.items()}
    assert results["reference-0"]["cosine"] > 1 - 1e-6
    assert results["hoag-0"]["error"] < 0.05
    assert results["cg-0"]["cosine"] > 0.5
    assert results["cg-0"]["error"] < results["identity-0"]["error"]


def test_gauss_newton_is_the_hessian_of_logistic_regression(histories):
    for gauss_newton, hessian in zip(histories["gauss-newton-0"]["rows"], histories["cg-0"]["rows"], strict=True):
        assert gauss_newton["validation loss"] == pytest.approx(hessian["validation loss"], rel=1e-3)


def test_a_second_call_reads_what_the_first_has_stored(system, command, histories):
    check_stored(system, command, histories)


def test_the_report_has_a_table_and_a_picture(system, histories, tmp_path):
    said = report_of(system, histories, tmp_path)
    assert said.startswith("| Successors of the paper | ")
    assert "| SOBA (1 product, warm start) |" in said

"""A report tells the damping that the solver found."""

import cases
import numpy as np
import pytest

import bilevel as bl


def test_a_found_damping_is_a_finding(backend):
    case = cases.quadratic(backend, [-0.1, 0.5, 1.0, 2.0])
    report = bl.diagnose(*case.at, **case.args)
    [finding] = [f for f in report.findings if f.name == "negative curvature"]
    assert "CG() added a damping of 0.2." in finding.what
    assert "Train the inner problem further" in finding.way_out
    assert not report.ok
    assert "> curvature" in str(report)
    norms = np.linalg.norm(case.matrix @ np.asarray(case.adjoint)), np.linalg.norm(backend.to_numpy(case.params))
    assert report.sensitivity == pytest.approx(norms[0] * norms[1])


def test_a_given_damping_is_none(backend):
    case = cases.quadratic(backend, [-0.1, 0.5, 1.0, 2.0])
    report = bl.diagnose(*case.at, **case.args, solver=bl.CG(damping=0.5))
    assert "negative curvature" not in {f.name for f in report.findings}


def test_a_convex_problem_needs_none(backend):
    case = cases.quadratic(backend, [0.1, 0.5, 1.0, 2.0])
    assert bl.diagnose(*case.at, **case.args).ok

"""Unrolls that diverge or meet nan."""

import numpy as np
import pytest
from unrolled_cases import OPTIMIZERS, PROBLEM, WAYS, Quartic

import bilevel as bl
from bilevel import Status


class TestFailures:
    @pytest.mark.parametrize("way", WAYS)
    def test_steps_that_drive_apart(self, backend, way):
        problem = bl.problems.quadratic(*(backend.from_numpy(a) for a in (np.diag([1.0, 10.0]), np.eye(2), np.ones(2))))
        w = backend.from_numpy(np.zeros(2))
        solver = bl.Unrolled(steps=30, step_size=0.5, **WAYS[way])
        with pytest.raises(bl.SolverError, match=r"Unrolled: diverged.* use step_size=0\.1 "):
            bl.hypergradient(problem, w, w + 0, solver=solver, on_failure="raise")
        hg = bl.hypergradient(problem, w, w + 0, solver=solver, on_failure="ignore")
        assert hg.info.status is Status.DIVERGED

    def test_batches_that_drive_apart(self, backend):
        """The error looks for the curvature, of the first batch."""
        case = Quartic()
        args = [tuple(map(backend.from_numpy, batch)) for batch in case.batches]
        w, h = backend.from_numpy(case.w), backend.from_numpy(case.h)
        outer = tuple(map(backend.from_numpy, (case.t, case.d)))
        solver = bl.Unrolled(steps=2, step_size=20.0)
        with pytest.raises(bl.SolverError, match=r"Unrolled: diverged.* use step_size="):
            bl.hypergradient(PROBLEM, w, h, inner_args=args, outer_args=outer, solver=solver, on_failure="raise")

    def test_adams_steps_that_drive_apart(self):
        """At a minimum, where its step is a sign smoothed by eps; the inverse of the curvature would be no advice."""
        problem = bl.problems.quadratic(hessian=np.eye(2), coupling=np.eye(2), target=np.ones(2))
        solver = bl.Unrolled(steps=5, optimizer="adam", step_size=0.1)
        with pytest.warns(
            bl.SolverWarning, match=r"Unrolled: diverged: Adam's steps .*Use a smaller step_size, a larger"
        ):
            hg = bl.hypergradient(problem, np.zeros(2), np.zeros(2), solver=solver)
        assert hg.info.status is Status.DIVERGED
        smoothed = bl.Unrolled(steps=5, optimizer="adam", step_size=0.1, eps=0.1)
        assert bl.hypergradient(problem, np.zeros(2), np.zeros(2), solver=smoothed).info.status is Status.CONVERGED

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("optimizer", ["descent", "adam"])
    def test_nan_raises(self, backend, way, optimizer):
        case = Quartic()
        case.batches[1][0][0, 0] = np.nan
        hg = case.hypergradient(backend, 3, truncation=7, **OPTIMIZERS[optimizer], **WAYS[way])
        assert hg.info.status is Status.NON_FINITE

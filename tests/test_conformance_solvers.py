"""The suite of solvers: a sound one passes, each typical fault is caught by the check that names it."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

import bilevel as bl
from bilevel import Status
from bilevel.solvers.operators import damped, norm, residual, scale_free
from bilevel.testing import check_solver

SEEDS = itertools.count()


@dataclass(frozen=True)
class Textbook:
    """Conjugate gradients as in a textbook, with what the suite asks for besides; or with one fault."""

    maxiter: int = 50
    rtol: float = 1e-6
    damping: float = 0.0
    fault: str = ""

    def solve(self, operator, rhs, x0, space):
        A = operator if self.fault == "ignores the damping" else damped(operator, self.damping, space)
        x0 = None if self.fault == "ignores the warm start" else x0
        if self.fault == "takes absolute tolerances":
            return self.cg(A, rhs, x0, space)
        if self.fault == "starts at random":
            x0 = space.normal_like(rhs, next(SEEDS))
        x, info = scale_free(lambda b, x0, scale: self.cg(A, b, x0, space), rhs, x0, space)
        if self.fault == "promotes the dtype":
            x = x + 0 * np.zeros(1)
        if self.fault == "writes into its arguments":
            rhs *= 2
        return x, info

    def cg(self, A, b, x0, space):
        xp, fault = space.xp, self.fault
        size = norm(b, space)
        floor = 1e-12 if fault == "takes absolute tolerances" else 0.0
        rtol = xp.maximum(self.rtol * xp.ones_like(size), space.eps(b) * xp.ones_like(size))
        if fault == "compares its options":
            rtol = max(self.rtol, space.eps(b))
        tolerance = xp.maximum(rtol * size, floor * xp.ones_like(size))
        dot = space.dot if fault != "forgets a leaf" else self.dot_of_the_first_leaf(space)

        def step(s):
            x, r, p, rr, steps, live, _ = s
            Ap = A(p)
            pAp = dot(p, Ap)
            ok = live & (pAp > 0) & xp.isfinite(pAp)
            alpha = xp.where(pAp == 0, 1.0, rr / xp.where(pAp == 0, 1.0, pAp))
            stored = ok if fault != "goes on after it has stopped" else xp.isfinite(pAp)
            if fault == "breaks before it stores the iterate":
                stored = ok & (xp.sqrt(dot(space.axpy(-alpha, Ap, r), space.axpy(-alpha, Ap, r))) > tolerance)
            new = space.select(stored, space.axpy(alpha, p, x), x)
            r = space.select(ok, space.axpy(-alpha, Ap, r), r)
            rr_new = xp.where(ok, dot(r, r), rr)
            p = space.select(ok, space.axpy(rr_new / rr, p, r), p)
            broken = live & ~xp.isfinite(pAp)
            go_on = ok & (xp.sqrt(rr_new) > tolerance)
            if fault != "ignores maxiter":
                go_on = go_on & (steps + 1 < self.maxiter)
            return new, r, p, rr_new, steps + live, go_on, broken

        if x0 is None:
            x, r = space.zeros_like(b), b
        else:
            keep = size > 0 if fault != "keeps the warm start of b = 0" else size >= 0
            x = space.select(keep, x0, space.zeros_like(b))
            r = residual(A, b, x, space)
        rr = space.dot(r, r)
        zero = xp.zeros_like(rr, dtype=xp.int32)
        live = (xp.sqrt(rr) > tolerance) & (self.maxiter > 0)
        s = (x, r, r, rr, zero, live, live & False)
        if fault == "reads the flag at each step":
            for _ in range(self.maxiter):
                if s[5]:
                    s = step(s)
        else:
            s = space.while_loop(lambda s: s[5], step, s, self.maxiter if fault != "ignores maxiter" else 1000)
        x, _, _, rr, steps, _, broken = s

        left = norm(residual(A, b, x, space), space)
        finite = xp.isfinite(left) & ~broken
        status = xp.where(left <= tolerance, int(Status.CONVERGED), xp.full_like(zero, int(Status.MAXITER)))
        if fault != "is quiet about nan":
            status = xp.where(finite, status, int(Status.NON_FINITE))
            x = space.scale(xp.where(finite, 1.0, float("nan")), x)
        if fault == "always claims success":
            status = xp.where(status == int(Status.NON_FINITE), status, int(Status.CONVERGED))
        if fault == "trusts its recurrence":
            status = xp.where(xp.sqrt(rr) <= tolerance, int(Status.CONVERGED), status)
        if fault == "reports another residual":
            left = 0.1 * tolerance
        return x, bl.SolverInfo(steps, left, size, status)

    def dot_of_the_first_leaf(self, space):
        def first(tree):
            while not hasattr(tree, "shape"):
                tree = tree[min(tree)] if isinstance(tree, dict) else tree[0]
            return tree

        return lambda x, y: space.dot(first(x), first(y))


SOUND = Textbook()
PROMISES = {"solves": ["definite", "ill_conditioned", "singular"]}


@pytest.mark.parametrize("check", check_solver(SOUND, **PROMISES), ids=str)
def test_a_sound_solver_passes(check):
    check()


def failures(solver, backend="numpy", **promises):
    """The checks that fail, with what they say."""
    said = {}
    for check in check_solver(solver, backends=backend, **{**PROMISES, **promises}):
        try:
            check()
        except AssertionError as error:
            said[check.name] = str(error)
    return said


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("ignores the damping", "damping-numpy"),
        ("ignores the warm start", "warm_start_used-numpy"),
        ("takes absolute tolerances", "extreme_scales-numpy"),
        ("starts at random", "deterministic-numpy"),
        ("promotes the dtype", "definite-numpy-float32"),
        ("writes into its arguments", "inputs_untouched-numpy"),
        ("forgets a leaf", "nested_tree-numpy"),
        ("goes on after it has stopped", "overrun-numpy"),
        ("breaks before it stores the iterate", "multiples_of_identity-numpy"),
        ("ignores maxiter", "maxiter-numpy"),
        ("keeps the warm start of b = 0", "zero_rhs-numpy"),
        ("is quiet about nan", "nan_product-numpy"),
        ("always claims success", "inconsistent-numpy-float64"),
        ("always claims success", "indefinite-numpy-float32"),
        ("reports another residual", "definite-numpy-float64"),
        ("trusts its recurrence", "drift-numpy"),
    ],
)
def test_a_fault_is_caught_by_the_check_that_names_it(fault, check):
    said = failures(replace(SOUND, fault=fault))
    assert check in said, sorted(said)

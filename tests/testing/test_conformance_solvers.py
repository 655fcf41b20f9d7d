"""The suite of solvers: what is sound passes, each typical fault is caught by the check that names it."""

import itertools
import re
from dataclasses import dataclass, replace
from unittest import SkipTest

import numpy as np
import pytest
from frameworks import failures

import bilevel as bl
from bilevel import Status
from bilevel.methods import Method, Pullback, Solution
from bilevel.operators.scaling import scale_free
from bilevel.testing import check_solver

SEEDS = itertools.count()


@dataclass(frozen=True)
class Textbook(bl.LinearSolver):
    """Conjugate gradients as in a textbook, with what the suite asks for besides; or with one fault."""

    maxiter: int = 50
    rtol: float = 1e-6
    damping: float = 0.0
    fault: str = ""

    def solve(self, state, A, rhs, x0):
        space, A = A.space, A if self.fault == "ignores the damping" else A.damped(self.damping)
        x0 = None if self.fault == "ignores the warm start" else x0
        if self.fault == "takes absolute tolerances":
            return self.cg(A, rhs, x0, space)
        if self.fault == "starts at random":
            x0 = space.normal(next(SEEDS))
        x, info = scale_free(lambda b, x0, scale: self.cg(A, b, x0, space), rhs, x0, space)
        if self.fault == "promotes the dtype":
            x = x + 0 * np.zeros(1)
        if self.fault == "writes into its arguments":
            rhs *= 2
        return x, info

    def cg(self, A, b, x0, space):
        xp, fault = space.xp, self.fault
        size = space.norm(b)
        floor = 1e-12 if fault == "takes absolute tolerances" else 0.0
        rtol = xp.maximum(self.rtol * xp.ones_like(size), space.eps * xp.ones_like(size))
        if fault == "compares its options":
            rtol = max(self.rtol, space.eps)
        tolerance = xp.maximum(rtol * size, floor * xp.ones_like(size))
        dot = space.dot if fault != "forgets a leaf" else self.dot_of_the_first_leaf(space)

        def step(s):
            x, r, p, rr, largest, steps, live, _ = s
            Ap = A(p)
            pAp, pp = dot(p, Ap), dot(p, p)
            largest = xp.maximum(largest, pAp / xp.where(pp == 0, 1.0, pp))
            noise = space.eps * largest * pp if fault != "follows rounding noise" else 0 * pp
            ok = live & (pAp > noise) & xp.isfinite(pAp)
            alpha = xp.where(pAp == 0, 1.0, rr / xp.where(pAp == 0, 1.0, pAp))
            stored = ok if fault != "goes on after it has stopped" else xp.isfinite(pAp)
            if fault == "breaks before it stores the iterate":
                stored = ok & (xp.sqrt(dot(space.axpy(-alpha, Ap, r), space.axpy(-alpha, Ap, r))) > tolerance)
            new = space.where(stored, space.axpy(alpha, p, x), x)
            r = space.where(ok, space.axpy(-alpha, Ap, r), r)
            rr_new = xp.where(ok, dot(r, r), rr)
            p = space.where(ok, space.axpy(rr_new / rr, p, r), p)
            broken = live & ~xp.isfinite(pAp)
            go_on = ok & (xp.sqrt(rr_new) > tolerance)
            if fault != "ignores maxiter":
                go_on = go_on & (steps + 1 < self.maxiter)
            return new, r, p, rr_new, largest, steps + live, go_on, broken

        if x0 is None:
            x, r = space.zeros(), b
        else:
            keep = size > 0 if fault != "keeps the warm start of b = 0" else size >= 0
            x = space.where(keep, x0, space.zeros())
            r = A.residual(b, x)
        rr = space.dot(r, r)
        zero = xp.zeros_like(rr, dtype=xp.int32)
        live = (xp.sqrt(rr) > tolerance) & (self.maxiter > 0)
        s = (x, r, r, rr, xp.zeros_like(rr), zero, live, live & False)
        if fault == "reads the flag at each step":
            for _ in range(self.maxiter):
                if s[6]:
                    s = step(s)
        else:
            s = space.while_loop(lambda s: s[6], step, s, self.maxiter if fault != "ignores maxiter" else 1000)
        x, _, _, rr, _, steps, _, broken = s

        left = space.norm(A.residual(b, x))
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


FAULTS = {
    "ignores the damping": "damping",
    "ignores the warm start": "warm_start_used",
    "takes absolute tolerances": "extreme_scales",
    "starts at random": "deterministic",
    "promotes the dtype": "definite-float32",
    "writes into its arguments": "inputs_untouched",
    "forgets a leaf": "nested_tree",
    "goes on after it has stopped": "overrun",
    "breaks before it stores the iterate": "multiples_of_identity-float64",
    "ignores maxiter": "maxiter",
    "keeps the warm start of b = 0": "zero_rhs",
    "is quiet about nan": "nan_product",
    "always claims success": "inconsistent-float64",
    "trusts its recurrence": "drift",
    "follows rounding noise": "runaway",
    "reports another residual": "definite-float64",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_solver_is_caught_by_the_check_that_names_it(fault):
    said = failures(check_solver(replace(SOUND, fault=fault), **PROMISES, backends="numpy"))
    law, _, dtype = FAULTS[fault].partition("-")
    assert "-".join(filter(None, (law, "numpy", dtype))) in said, sorted(said)


def test_a_host_that_waits_for_the_device_at_each_step_is_caught():
    pytest.importorskip("torch")
    said = failures(check_solver(replace(SOUND, fault="reads the flag at each step"), **PROMISES, backends="torch"))
    assert list(said) == ["host_reads-torch"]


@pytest.mark.parametrize("fault", ["compares its options", "reads the flag at each step"])
def test_what_cannot_be_traced_is_caught(fault):
    pytest.importorskip("jax")
    said = failures(check_solver(replace(SOUND, fault=fault), **PROMISES, backends="jax"))
    assert "definite-jax-float64" in said
    assert "TracerBoolConversionError" in said["definite-jax-float64"]


def test_a_failure_names_the_law_the_system_and_both_numbers():
    said = failures(check_solver(replace(SOUND, fault="breaks before it stores the iterate"), backends="numpy"))
    pattern = (
        r"multiples_of_identity-numpy-float64: 2 I v = b has the solution b/2.*\n"
        r"On 2 times the identity, by Textbook\(.*\), float64, numpy:\n"
        r"  expected CONVERGED .*\n  got      MAXITER after 1 steps, residual_norm 1\.9 of 1\.9, v = \[0\. 0\."
    )
    assert re.match(pattern, said["multiples_of_identity-numpy-float64"])


class TestPromises:
    def test_what_is_not_promised_may_fail_but_not_lie(self):
        assert not failures(
            check_solver(bl.CG(), solves=[], backends="numpy")
        )  # it damps what curves down, and says so
        said = failures(check_solver(bl.CG(damping=0.0), solves=["definite", "indefinite"], backends="numpy"))
        assert {"indefinite-numpy-float64", "indefinite-numpy-float32"} <= set(said)
        assert "got      NEGATIVE_CURVATURE" in said["indefinite-numpy-float64"]

    def test_a_truncated_method_is_held_to_its_accuracy(self):
        short, promises = bl.Neumann(terms=5, step_size=0.25), {"truncated": True, "backends": "numpy"}
        assert "definite-numpy-float64" in failures(check_solver(short, **promises))
        assert not failures(check_solver(short, rtol=0.3, **promises))

    def test_a_truncated_method_that_claims_more_is_caught(self):
        assert "ill_conditioned-numpy-float64" in failures(check_solver(bl.Neumann(), solves=[], backends="numpy"))

    def test_nonsymmetric_systems_need_the_attribute(self):
        said = failures(check_solver(bl.MINRES(), solves=["nonsymmetric"], backends="numpy"))
        assert "requires without SYMMETRIC" in said["nonsymmetric-numpy"]

    def test_an_unused_warm_start_is_said(self):
        said = failures(check_solver(bl.CG(), warm_start=False, backends="numpy"))
        assert not set(said) - {"maxiter-numpy", "warm_start_ignored-numpy"}
        assert "warm_start_used-numpy" in failures(check_solver(bl.Exact(), backends="numpy"))

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"solves": ["definit"]}, ValueError, r"solves: there is no class 'definit'\. Did you mean 'definite'\?"),
            ({"excused": {"overun": ""}}, ValueError, r"excused: there is no check 'overun'\. Did you mean 'overrun'"),
            ({"excused": {"overrun-numpi": ""}}, ValueError, "there is no check 'overrun-numpi'"),
            ({"backends": "numpi"}, ValueError, r"backend: there is no 'numpi'\. Did you mean 'numpy'\?"),
            ({"rtol": -1.0}, ValueError, r"rtol: expected a number >= 0, got -1\.0"),
            ({"solver": 3}, TypeError, "expected a name, a mapping, a TOML file, or an object"),
        ],
        ids=str,
    )
    def test_mistakes_in_the_call_are_refused(self, arguments, error, message):
        with pytest.raises(error, match=message):
            check_solver(**{"solver": "cg", **arguments})


class TestExcuses:
    def check(self, name, excused):
        checks = check_solver(bl.CG(damping=0.0), solves=["definite", "indefinite"], backends="numpy", excused=excused)
        return {check.name: check for check in checks}[name]

    @pytest.mark.parametrize("name", ["indefinite", "indefinite-numpy-float32"])
    def test_an_excused_failure_is_a_skip_with_the_reason(self, name):
        with pytest.raises(SkipTest, match="indefinite-numpy-float32 is excused: CG needs definite"):
            self.check("indefinite-numpy-float32", {name: "CG needs definite"})()

    def test_an_excuse_for_one_check_excuses_no_other(self):
        with pytest.raises(AssertionError, match="expected CONVERGED"):
            self.check("indefinite-numpy-float64", {"indefinite-numpy-float32": "CG needs definite"})()

    def test_an_excuse_for_what_holds_is_an_error(self):
        with pytest.raises(AssertionError, match=r"definite-numpy-float64 is excused \(why\), but holds"):
            self.check("definite-numpy-float64", {"definite": "why"})()

    def test_an_excuse_may_name_what_is_not_installed_or_does_not_apply(self):
        self.check("definite-numpy-float64", {"host_reads": "eager only", "overrun-torch": "reads its flag"})()

    def test_an_exception_of_the_solver_is_a_failure_that_quotes_it(self):
        class Raising(bl.LinearSolver):
            def solve(self, state, A, b, x0):
                raise KeyError("alpha")

        (check, *_) = check_solver(Raising(), backends="numpy")
        with pytest.raises(AssertionError, match="Raised KeyError: 'alpha'") as caught:
            check()
        assert isinstance(caught.value.__cause__, KeyError)


@dataclass(frozen=True)
class DenseMethod(Method):
    """The closed form by a dense solve, as a method; or with one fault."""

    fault: str = ""

    def explain(self, info, symmetric, curvature):
        return "failed"

    def solve(self, level, adjoint0):
        space, fault = level.space, self.fault
        away = space.scale(0.0, level.params) if fault == "takes the Hessian elsewhere" else level.params

        def pullback(cotangent):
            A = level.operator(level.linearize(params=away))
            v, info = bl.Exact().solve(None, A, cotangent, None)
            if fault == "is quiet about nan":
                info = info._replace(status=space.xp.full_like(info.status, 0))
                v = space.map(lambda a: space.leaf_xp.where(space.leaf_xp.isfinite(a), a, 0.5), v)
            grad = level.linearize().vjp_hparams(v)
            if grad is None and fault == "expects a cross term":
                grad = level.hparams
            if grad is not None and fault != "has the wrong sign":
                grad = level.backend.space(grad).scale(-1.0, grad)
            return Pullback(grad, v, info)

        return Solution(level.params, pullback)


METHOD_FAULTS = {
    "is quiet about nan": "nan_hessian-numpy",
    "has the wrong sign": "definite-numpy-float64",
    "takes the Hessian elsewhere": "curved-numpy",
    "expects a cross term": "without_cross_term-numpy",
}


def test_a_sound_method_passes():
    checks = check_solver(DenseMethod(), solves=["definite", "indefinite"], backends="numpy")
    assert len(checks) > 10
    assert not failures(checks)


@pytest.mark.parametrize("fault", METHOD_FAULTS)
def test_a_fault_of_a_method_is_caught_by_the_check_that_names_it(fault):
    said = failures(check_solver(DenseMethod(fault), backends="numpy"))
    assert METHOD_FAULTS[fault] in said, sorted(said)

"""Errors of Unrolled."""

import numpy as np
import pytest
from frameworks import framework
from unrolled_cases import PROBLEM, Quartic, QuarticInner, QuarticOuter

import bilevel as bl
from bilevel.linearization import LinearizedMap


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"mode": "foward"},
                r'Unrolled\.mode: expected "reverse" or "forward", got \'foward\'\. Did you mean "forward"',
            ),
            (
                {"optimizer": "Adam"},
                r'Unrolled\.optimizer: expected "descent" or "adam", got \'Adam\'\. Did you mean "adam"',
            ),
            ({"optimizer": "lbfgs"}, r'Unrolled\.optimizer: expected "descent" or "adam", got \'lbfgs\'\.$'),
            ({"checkpoint": 1}, r'Unrolled\.checkpoint: expected True, False or "auto", got 1\.'),
            ({"mode": "forward", "checkpoint": True}, r'Unrolled\.checkpoint: mode="forward" stores no iterates'),
            ({"optimizer": "adam", "momentum": 0.9}, r'Unrolled\.momentum: optimizer="adam" has no momentum'),
            ({"beta2": 0.99}, r'Unrolled\.beta2: optimizer="descent" has no beta2; leave it out'),
            ({"eps": 1e-3}, r'Unrolled\.eps: optimizer="descent" has no eps'),
            ({"optimizer": "adam", "beta1": 1.0}, r"Unrolled\.beta1: expected a finite number >= 0 and < 1, got 1\.0"),
            ({"optimizer": "adam", "eps": 0}, r"Unrolled\.eps: expected a finite number > 0, got 0"),
            ({"momentum": 1.0}, r"Unrolled\.momentum: expected a finite number >= 0 and < 1, got 1\.0"),
        ],
        ids=str,
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            bl.get_solver("unrolled", **options)

    def test_too_many_hyperparameters_for_forward_mode(self, backend):
        n = 101
        problem = bl.problems.quadratic(*(backend.from_numpy(a) for a in (np.eye(n), np.eye(n), np.ones(n))))
        w, h = (backend.from_numpy(np.ones(n)) for _ in range(2))
        with pytest.raises(ValueError, match=r'for each entry of hparams, at most 100, but hparams has 101.*"reverse"'):
            bl.hypergradient(problem, w, h, solver=bl.Unrolled(mode="forward"))

    def test_an_objective_without_cross_jvp(self):
        class NoCrossJvp:
            __call__, grad, hvp, cross_vjp = (
                QuarticInner.__call__,
                QuarticInner.grad,
                QuarticInner.hvp,
                QuarticInner.cross_vjp,
            )

        case = Quartic()
        args = {"inner_args": case.batches[0], "outer_args": (case.t, case.d)}
        problem = bl.Problem(NoCrossJvp(), QuarticOuter())
        assert bl.hypergradient(problem, case.w, case.h, **args, solver="unrolled").grad.shape == (4,)
        with pytest.raises(TypeError, match=r"\(NoCrossJvp\) has no .*cross_jvp.*mode=\"reverse\" does not need it"):
            bl.hypergradient(problem, case.w, case.h, **args, solver=bl.Unrolled(mode="forward"))

    def test_a_cross_jvp_of_the_wrong_shape(self):
        class Wrong(QuarticInner):
            def cross_jvp(self, w, h, u, X, y, S):
                return u

        case = Quartic()
        args = {"inner_args": case.batches[0], "outer_args": (case.t, case.d)}
        with pytest.raises(ValueError, match="the inner cross_jvp: expected the structure of params"):
            bl.hypergradient(
                bl.Problem(Wrong(), QuarticOuter()), case.w, case.h, **args, solver=bl.Unrolled(mode="forward")
            )

    def test_derivatives_that_forward_mode_cannot_use(self):
        """A backend without the optional product, and the transposed Jacobian of a fixed point."""

        class Changed(type(framework("numpy"))):
            def inner(self, *args) -> LinearizedMap:
                return super().inner(*args)._replace(jvp_hparams=None)

        class Halve:
            def __call__(self, w, h, *args):
                return w / 2

            def vjp_params(self, w, h, v, *args):
                return v / 2

            def vjp_hparams(self, w, h, v, *args):
                return None

        case, solver = Quartic(), bl.Unrolled(mode="forward", step_size=0.1)
        args = {"inner_args": case.batches[0], "outer_args": (case.t, case.d), "solver": solver}
        with pytest.raises(TypeError, match=r"numpy backend does not have \(LinearizedMap\.jvp_hparams\)"):
            bl.hypergradient(PROBLEM, case.w, case.h, **args, backend=Changed())
        with pytest.raises(TypeError, match=r"Only products with its transpose.*Use mode=\"reverse\""):
            bl.hypergradient(bl.FixedPoint(Halve(), PROBLEM.outer), case.w, case.h, **args)

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], ValueError, "inner_args: the list has no batch"),
            (
                [np.ones(2), np.ones(2)],
                TypeError,
                r"inner_args\[0\]: expected a tuple .*got an array.*one tuple per batch",
            ),
            ([(np.ones(2),), [np.ones(2)]], TypeError, r"inner_args\[1\]: expected a tuple of arguments.*got list"),
            (
                np.ones(2),
                TypeError,
                r"inner_args: expected a tuple of arguments, as in inner_args=\(x, y\), got an array",
            ),
        ],
        ids=["none", "no tuple", "a list", "an array"],
    )
    def test_batches(self, batches, error, message):
        case = Quartic()
        with pytest.raises(error, match=message):
            bl.hypergradient(PROBLEM, case.w, case.h, inner_args=batches, solver="unrolled")

    def test_the_outer_objective_takes_one_set_of_arguments(self):
        case = Quartic()
        with pytest.raises(TypeError, match=r"outer_args: expected a tuple of arguments.*got list\.$"):
            bl.hypergradient(PROBLEM, case.w, case.h, inner_args=case.batches[0], outer_args=[(case.t, case.d)])

"""Bad input and failed solves: what the user is told, and that nothing of theirs is touched."""

import re
import warnings

import numpy as np
import pytest
from cases import diagonal
from frameworks import framework
from scipy import sparse

import bilevel as bl
from bilevel import Status


def half_square(target):
    """L = ½ scale ‖w − λ‖², F = ½ ‖w − target‖², for torch and jax."""
    return bl.Problem(
        lambda w, h, scale=1.0: 0.5 * scale * ((w - h) ** 2).sum(),
        lambda w, h: 0.5 * ((w - target) ** 2).sum(),
    )


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


def array(backend, *values, dtype=np.float64):
    return backend.from_numpy(np.array(values, dtype=dtype))


class TestArguments:
    def test_integer_params_name_the_leaf(self, backend):
        with pytest.raises(
            TypeError, match=r"params\['w'\]\[1\]: expected a floating-point leaf, got .*int64.*inner_args"
        ):
            bl.hypergradient(
                half_square(0.0),
                {"w": [array(backend, 1.0), array(backend, 1, dtype=np.int64)]},
                array(backend, 1.0),
            )

    def test_integer_hparams_name_the_leaf(self, backend):
        with pytest.raises(TypeError, match=r"hparams: expected a floating-point leaf"):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), array(backend, 1, dtype=np.int64))

    def test_complex_leaves_are_refused(self, backend):
        with pytest.raises(TypeError, match="hparams: expected a floating-point leaf"):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), array(backend, 1j, dtype=np.complex128))

    def test_python_numbers_are_refused_by_name(self, backend):
        with pytest.raises(TypeError, match=r"hparams\['reg'\]: expected an array of \w+, got float"):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), {"reg": 0.1})

    def test_trees_without_arrays(self):
        with pytest.raises(TypeError, match="expected trees of NumPy, torch or JAX arrays, got str and list"):
            bl.hypergradient(half_square(0.0), "1", ["a"])

    def test_empty_hparams(self, backend):
        with pytest.raises(ValueError, match="hparams has no leaves"):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), {})

    def test_params_without_entries(self, backend):
        with pytest.raises(ValueError, match="params has no entries: all its leaves are empty"):
            bl.hypergradient(half_square(0.0), {"a": array(backend, np.ones((0, 3)))}, array(backend, 1.0))

    def test_mixed_frameworks(self, autodiff):
        with pytest.raises(TypeError, match=r"params must|must belong to one framework") as error:
            bl.hypergradient(half_square(0.0), array(autodiff, 1.0), {"reg": np.ones(1)})
        assert "hparams['reg']" in str(error.value)

    def test_a_backend_by_name_refuses_other_arrays(self, autodiff):
        with pytest.raises(TypeError, match=f"params: expected an array of {autodiff.name}, got ndarray"):
            bl.hypergradient(half_square(0.0), np.ones(2), np.ones(2), backend=autodiff.name)

    def test_an_adjoint_of_another_shape(self, backend):
        problem = bl.problems.ridge()
        X, y = array(backend, [1.0, 2.0], [3.0, 1.0]), array(backend, 1.0, 2.0)
        with pytest.raises(ValueError, match=r"adjoint0: expected the structure of params\. params has shape \(2,\)"):
            bl.hypergradient(
                problem,
                array(backend, 1.0, 1.0),
                array(backend, 1.0, 1.0),
                inner_args=(X, y),
                outer_args=(X, y),
                adjoint0=array(backend, 1.0),
            )

    def test_an_adjoint_of_another_structure(self, autodiff):
        with pytest.raises(
            ValueError, match=r"adjoint0\['b'\]: .* params\['b'\] has shape .* adjoint0 has no leaf \['b'\]"
        ):
            bl.hypergradient(
                half_square(0.0),
                {"a": array(autodiff, 1.0), "b": array(autodiff, 1.0)},
                array(autodiff, 1.0),
                adjoint0={"a": array(autodiff, 1.0)},
            )

    def test_args_that_are_no_tuple(self, backend):
        with pytest.raises(TypeError, match=r"inner_args: expected a tuple of arguments, as in inner_args=\(x, y\)"):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), array(backend, 1.0), inner_args=array(backend, 1.0))

    def test_on_failure(self, backend):
        with pytest.raises(ValueError, match='on_failure: expected "raise", "warn" or "ignore", got \'warning\''):
            bl.hypergradient(half_square(0.0), array(backend, 1.0), array(backend, 1.0), on_failure="warning")

    def test_a_problem_of_no_functions(self):
        with pytest.raises(TypeError, match=r"Problem\.outer: expected a function"):
            bl.Problem(lambda w, h: w, 3.0)

    def test_different_devices(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(ValueError, match=r"hparams\['b'\] is on meta, but params is on cpu: move one of them"):
            bl.hypergradient(half_square(0.0), torch.ones(1), {"b": torch.ones(1, device="meta")})

    def test_the_same_tensor_twice(self):
        torch = pytest.importorskip("torch")
        w = torch.ones(1)
        with pytest.raises(ValueError, match=r"hparams\['h'\] is the same tensor as params\[0\]"):
            bl.hypergradient(half_square(0.0), [w], {"h": w})


class TestObjectives:
    @pytest.mark.parametrize("role", ["inner", "outer"])
    def test_a_loss_that_is_no_scalar(self, autodiff, role):
        good, bad = lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (w - h) ** 2
        problem = bl.Problem(*((bad, good) if role == "inner" else (good, bad)))
        with pytest.raises(ValueError, match=rf"{role}: expected a scalar, got an array of shape \(2,\).*mean or sum"):
            bl.hypergradient(problem, array(autodiff, 1.0, 2.0), array(autodiff, 1.0, 2.0))

    def test_a_loss_that_is_a_python_number(self, autodiff):
        problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: 1.0)
        with pytest.raises(TypeError, match="outer: expected a scalar"):
            bl.hypergradient(problem, array(autodiff, 1.0), array(autodiff, 1.0))

    def test_hparams_without_influence_are_named(self, autodiff):
        closed_over = array(autodiff, 2.0)
        problem = bl.Problem(lambda w, h: ((w - closed_over) ** 2).sum(), lambda w, h: (w**2).sum())
        with pytest.raises(
            ValueError, match=r"Neither F nor ∂L/∂w depends on hparams\['a'\], hparams\['b'\]\. .*closed over"
        ):
            bl.hypergradient(problem, array(autodiff, 1.0), {"a": array(autodiff, 1.0), "b": array(autodiff, 1.0)})

    @pytest.mark.parametrize("solver", ["cg", "unrolled"])
    def test_a_leaf_of_hparams_without_influence_gets_zeros(self, autodiff, solver):
        problem = bl.Problem(lambda w, h: ((w - h["a"]) ** 2).sum(), lambda w, h: (w**2).sum())
        hparams = {"a": array(autodiff, 1.0), "b": array(autodiff, 1.0, 2.0)}
        with pytest.warns(
            bl.DependenceWarning,
            match=r"Neither outer nor the gradient of inner by params depends on hparams\['b'\]: its hypergradient is "
            r'zero\. Compute inner with the hparams that are passed.*warnings.simplefilter\("ignore", bl.Dep',
        ):
            hg = bl.hypergradient(problem, array(autodiff, 1.0), hparams, solver=solver)
        assert autodiff.to_numpy(hg.grad["b"]).tolist() == [0.0, 0.0]
        assert autodiff.to_numpy(hg.grad["a"])[0] == pytest.approx(2.0)

    def test_a_direct_term_alone_is_enough(self, autodiff):
        problem = bl.Problem(lambda w, h: (w**2).sum(), lambda w, h: (w * h).sum())
        with pytest.warns(bl.DependenceWarning, match=r"^hparams has no influence on the minimum.* only from outer\. "):
            hg = bl.hypergradient(problem, array(autodiff, 3.0), array(autodiff, 5.0))
        assert autodiff.to_numpy(hg.grad).tolist() == [3.0]

    def test_params_without_influence_get_zeros(self, autodiff):
        problem = bl.Problem(
            lambda w, h: ((w["a"] - h) ** 2).sum() + (w["b"] ** 2).sum(), lambda w, h: (w["a"] ** 2).sum()
        )
        params = {"a": array(autodiff, 1.0), "b": array(autodiff, 0.0, 0.0)}
        hg = bl.hypergradient(problem, params, array(autodiff, 1.0))
        assert autodiff.to_numpy(hg.adjoint["b"]).tolist() == [0.0, 0.0]
        unused = bl.Problem(lambda w, h: ((w["a"] - h) ** 2).sum(), problem.outer)
        hg = bl.hypergradient(unused, params, array(autodiff, 1.0))
        assert autodiff.to_numpy(hg.adjoint["b"]).tolist() == [0.0, 0.0]

    def test_an_outer_objective_without_params_gives_the_direct_term(self, autodiff):
        problem = bl.Problem(lambda w, h: ((w - h) ** 2).sum(), lambda w, h: (h**2).sum())
        with pytest.warns(bl.DependenceWarning, match="outer does not depend on params.* in the right order?"):
            hg = bl.hypergradient(problem, array(autodiff, 3.0), array(autodiff, 5.0))
        assert autodiff.to_numpy(hg.grad).tolist() == [10.0]
        assert hg.info.status is Status.CONVERGED

    def test_analytic_methods_that_are_missing(self):
        class NoHvp:
            def __call__(self, params, hparams):
                return 0.0

            def grad(self, params, hparams):
                return params

        with pytest.raises(
            TypeError, match=r"inner objective \(NoHvp\) has no method 'hvp'.*torch and jax backends derive"
        ):
            bl.hypergradient(
                bl.Problem(NoHvp(), bl.problems.ridge().outer),
                np.ones(1),
                np.ones(1),
                outer_args=(np.eye(1), np.ones(1)),
            )

    def test_plain_functions_on_numpy_arrays(self):
        with pytest.raises(TypeError, match=r"has no method 'grad'"):
            bl.hypergradient(half_square(0.0), np.ones(1), np.ones(1))

    def test_an_analytic_product_of_the_wrong_shape(self):
        ridge = bl.problems.ridge()

        class Wrong:
            __call__, grad, cross_vjp = ridge.inner.__call__, ridge.inner.grad, ridge.inner.cross_vjp

            def hvp(self, params, hparams, vector, X, y):
                return vector[:, None]

        data = {"inner_args": (np.eye(2), np.ones(2)), "outer_args": (np.eye(2), np.zeros(2))}
        with pytest.raises(
            ValueError, match=r"the inner hvp: expected the structure of params.*\(2,\).*has shape \(2, 1\)"
        ):
            bl.hypergradient(bl.Problem(Wrong(), ridge.outer), np.ones(2), np.ones(2), **data)

    def test_a_linearization_that_is_none(self):
        lin = bl.Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: v)
        for wrong in (tuple(lin), lin._asdict(), None, bl.problems.ridge()):
            with pytest.raises(TypeError, match=r"expected bl\.Linearization\(value=\.\.\., .*, got an object"):
                bl.hypergradient_from(wrong)

    def test_a_linearization_without_right_hand_side(self):
        lin = bl.Linearization(0.0, None, np.ones(2), lambda v: v, lambda v: v)
        with pytest.raises(ValueError, match="grad_params is None: pass ∂F/∂w"):
            bl.hypergradient_from(lin)

    @pytest.mark.parametrize("name", ["hvp", "cross_vjp"])
    def test_a_matrix_in_place_of_a_product(self, name):
        lin = bl.Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: v)
        with pytest.raises(TypeError, match=rf"{name}: expected a function, such as lambda v: A @ v, got csr_array"):
            bl.hypergradient_from(lin._replace(**{name: sparse.csr_array(np.eye(2))}))

    def test_a_hand_made_product_of_the_wrong_shape(self):
        lin = bl.Linearization(0.0, np.ones(2), None, lambda v: np.outer(v, v), lambda v: v)
        with pytest.raises(ValueError, match=r"hvp\(v\): expected the structure of grad_params.*has shape \(2, 2\)"):
            bl.hypergradient_from(lin)

    def test_unrolling_a_linearization(self):
        lin = bl.Linearization(0.0, np.ones(2), None, lambda v: v, lambda v: v)
        with pytest.raises(
            TypeError,
            match=r"Unrolled runs inner steps and needs the problem: use bl\.hypergradient",
        ):
            bl.hypergradient_from(lin, solver="unrolled")


class TestFailedSolves:
    def raised(self, *case, **options):
        with pytest.raises(bl.SolverError) as caught:
            bl.hypergradient(*case, **options, on_failure="raise")
        return str(caught.value)

    def test_negative_curvature_names_the_cures(self, backend):
        case, undamped = diagonal([-2.0, 1.0], backend), bl.CG(damping=0.0)
        text = self.raised(*case, solver=undamped)
        damping = float(re.search(r"damping above ([0-9.e+-]+),", text)[1])
        assert damping == pytest.approx(2.0, rel=0.01)
        for part in (
            "CG: met non-positive curvature",
            'use damping="auto", ',
            'solver="minres"',
            "Gauss-Newton",
            "The residual is",
            "after 1 step.",
        ):
            assert part in text
        with pytest.warns(
            bl.SolverWarning, match=r"CG: met non-positive .*add damping, .*For the numbers, see hg.info"
        ):
            hg = bl.hypergradient(*case, solver=undamped)
        assert hg.info.status is Status.NEGATIVE_CURVATURE
        assert backend.to_numpy(hg.grad).all()
        again = bl.hypergradient(*case, solver=bl.CG(damping=1.5 * damping))
        assert again.info.status is Status.CONVERGED

    def test_a_singular_hessian_is_told_from_a_negative_one(self, backend):
        text = self.raised(*diagonal([0.0, 1.0, 2.0], backend))
        assert "the smallest is zero or slightly negative): add damping above 0.002" in text

    def test_the_warning_points_at_the_caller(self, backend):
        with pytest.warns(bl.SolverWarning) as caught:
            bl.hypergradient(*diagonal([-2.0, 1.0], backend), solver=bl.CG(damping=0.0))
        assert caught[0].filename == __file__

    def test_a_warning_is_shown_once_for_each_status_and_place(self, backend):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for scale in (1.0, 2.0, 3.0):
                for solver in (bl.CG(maxiter=1, damping=0.0), bl.CG(damping=0.0)):
                    bl.hypergradient(*diagonal([1.0, 10.0, scale], backend, target=[1.0, 2.0, 3.0]), solver=solver)
                    bl.hypergradient(*diagonal([-scale, 1.0], backend), solver=solver)
        lines = sorted({(str(w.message).partition(".")[0], w.lineno) for w in caught})
        assert len(caught) == len(lines) == 2

    def test_divergence_says_the_step_that_would_hold(self, backend):
        case = diagonal([1.0, 10.0], backend)
        text = self.raised(*case, solver=bl.Neumann(terms=100, step_size=0.3))
        assert "Neumann: diverged" in text
        step = float(re.search(r"use step_size=([0-9.e+-]+)", text)[1])
        assert step == pytest.approx(0.1, rel=0.05)
        assert bl.hypergradient(*case, solver=bl.Neumann(terms=300, step_size=step)).info.status is Status.CONVERGED
        with pytest.warns(bl.SolverWarning, match=r"Neumann: diverged\. Its step_size must stay below 2 over"):
            bl.hypergradient(*case, solver=bl.Neumann(terms=100, step_size=0.3))

    def test_divergence_on_a_negative_eigenvalue_says_that_no_step_holds(self, backend):
        text = self.raised(*diagonal([-1.0, 3.0], backend), solver="neumann")
        assert "negative eigenvalue (about -1), so no step size converges: add damping above 1" in text

    def test_divergence_claims_no_negative_eigenvalue_of_an_ill_conditioned_hessian(self, backend):
        eigenvalues = np.geomspace(1e-8, 1.0, 30)  # of which 12 products find none below 1e-4, give or take 1e-3
        text = self.raised(*diagonal(eigenvalues, backend), solver=bl.Neumann(step_size=2.5))
        assert re.search(r"largest eigenvalue of the Hessian is about 1: .* below 2\b", text)

    def test_maxiter_says_the_residual(self, backend):
        text = self.raised(*diagonal([1.0, 10.0], backend, target=[1.0, 2.0]), solver=bl.CG(maxiter=1))
        assert re.search(r"CG: stopped after 1 step above its tolerance\. Raise maxiter.* The residual is 0\.98", text)

    def test_on_failure_ignore_is_silent_but_honest(self, backend):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hg = bl.hypergradient(
                *diagonal([1.0, 10.0], backend, target=[1.0, 2.0]),
                solver=bl.CG(maxiter=1),
                on_failure="ignore",
            )
        assert hg.info.status is Status.MAXITER

    @pytest.mark.parametrize("part", ["hessian", "coupling", "target"])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("solver", ["identity", "neumann", "cg", "minres", "exact", "unrolled"])
    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own
    def test_nan_and_inf_raise_by_default(self, backend, part, bad, solver):
        if part == "hessian" and solver == "identity":
            pytest.skip("the identity does not look at the Hessian")
        values = np.diag([1.0, 2.0]) if part != "target" else np.ones(2)
        values[0] = bad
        case = diagonal([1.0, 2.0], backend, **{part: values})
        with pytest.raises(bl.SolverError, match=r"nan or (infinity|infinite)"):
            bl.hypergradient(*case, solver=solver)
        ignored = bl.hypergradient(*case, solver=solver, on_failure="ignore")
        assert ignored.info.status is Status.NON_FINITE

    def test_the_exact_solver_says_what_it_would_take(self, backend):
        n = 20_000
        lin = bl.Linearization(
            backend.from_numpy(np.array(0.0)), backend.from_numpy(np.ones(n)), None, lambda v: v, lambda v: v
        )
        with pytest.raises(ValueError, match=r'params has 20,000 entries.* 3\.0 GiB .*solver="cg"'):
            bl.hypergradient_from(lin, solver="exact")


class TestNothingOfTheUsersIsTouched:
    def test_torch_params_hparams_and_their_grads(self):
        torch = pytest.importorskip("torch")
        w = torch.randn(3, dtype=torch.float64, requires_grad=True)
        h = torch.randn(3, dtype=torch.float64, requires_grad=True)
        plain = torch.randn(3, dtype=torch.float64)
        w.grad, h.grad = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        before = [t.detach().clone() for t in (w, h, plain)]
        problem = bl.Problem(
            lambda p, h: ((p[0] - h) ** 2).sum() + ((p[1] - h) ** 2).sum(),
            lambda p, h: (p[0] ** 2).sum() + (p[1] ** 2).sum(),
        )
        for solver in ("cg", "unrolled", bl.Neumann(step_size=5.0), "exact"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bl.SolverWarning)
                hg = bl.hypergradient(problem, [w, plain], h, solver=solver)
            assert not any(t.requires_grad for t in (hg.grad, hg.value, *hg.adjoint))
        failing = bl.Problem(lambda p, h: (p[0].log() * h).sum() + (p[1] ** 2).sum(), problem.outer)
        with pytest.raises(bl.SolverError):
            bl.hypergradient(failing, [w, plain], h * float("nan"))
        for tensor, old in zip((w, h, plain), before, strict=True):
            assert torch.equal(tensor, old)
        for tensor in (w, h):
            assert torch.equal(tensor.grad, torch.ones(3, dtype=torch.float64))
        assert (w.requires_grad, h.requires_grad, plain.requires_grad) == (True, True, False)

    def test_numpy_arrays_are_not_written(self):
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((8, 3)), rng.standard_normal(8)
        w, h = rng.standard_normal(3), rng.standard_normal(3)
        for a in (X, y, w, h):
            a.setflags(write=False)
        for solver in ("cg", "neumann", "exact", "unrolled", "identity"):
            bl.hypergradient(bl.problems.ridge(), w, h, inner_args=(X, y), outer_args=(X, y), solver=solver)

    def test_torch_inference_mode_is_refused(self):
        torch = pytest.importorskip("torch")
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*zero without an error"):
            bl.hypergradient(half_square(0.0), torch.ones(1), torch.ones(1))

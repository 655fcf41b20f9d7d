"""Gauss-Newton products in place of the Hessian, and tests of each `curvature=` option."""

import gc

import numpy as np
import pytest
from frameworks import framework, namespace, relative_error
from scipy import linalg
from tanh_classifier import arrays, classifier, cross_entropies, move, products

import bilevel as bl
from bilevel.linearization import Inputs
from bilevel.testing import check_hypergradient


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


class TestGaussNewton:
    def test_it_is_the_hessian_of_a_linear_model(self, autodiff):
        xp = namespace(autodiff)

        def problem(curvature):
            return bl.Problem.from_model(
                lambda w, h, x: x @ w,
                lambda z, y: cross_entropies(xp, z, y).mean(),
                lambda w, h: (w**2).sum(),
                penalty=lambda w, h: (xp.exp(h) * w**2).sum(),
                curvature=curvature,
            )

        _, _, (x, y), _ = arrays()
        w, h = (np.random.default_rng(s).standard_normal((3, 3)) for s in (1, 2))
        point = Inputs(*move(autodiff, (w, h, (x, y))))
        approximate, exact = (products(autodiff, problem(c), point) for c in ("gauss-newton", "hessian"))
        for a, b in zip(approximate, exact, strict=True):
            assert relative_error(a, b) <= 1e-13

    def test_it_is_jt_h_j_and_positive_semidefinite(self, autodiff):
        """J by NumPy, from the chain rule of the two layers; the loss's Hessian in closed form."""
        params, hparams, (x, y), _ = arrays()
        point = Inputs(*move(autodiff, (params, hparams, (x, y))))
        matrix, _, _, along = products(autodiff, classifier(namespace(autodiff)), point)

        hidden = np.tanh(x @ params["A"] + params["a"])
        s, eye = 1 - hidden**2, np.eye(3)
        n = len(x)
        # d z[i, k] / d w, in the order A, B, a, b that sorted keys give
        J = np.concatenate(
            [
                np.einsum("ip,iq,qk->ikpq", x, s, params["B"]).reshape(n, 3, -1),
                np.einsum("iq,kl->ikql", hidden, eye).reshape(n, 3, -1),
                np.einsum("iq,qk->ikq", s, params["B"]),
                np.broadcast_to(eye, (n, 3, 3)),
            ],
            axis=2,
        )
        z = hidden @ params["B"] + params["b"]
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        H = np.einsum("ik,kl->ikl", p, eye) - np.einsum("ik,il->ikl", p, p)
        H *= np.exp(hparams["weight"])[:, None, None] / n
        decay = np.concatenate([hparams["decay"][name].ravel() for name in ("A", "B", "a", "b")])
        expected = np.einsum("ikp,ikl,ilq->pq", J, H, J) + 2 * np.diag(np.exp(decay))
        assert relative_error(matrix, expected) <= 1e-12
        assert linalg.eigvalsh(matrix).min() >= 2 * np.exp(decay).min() * (1 - 1e-10)
        assert np.isfinite(along).all()

    def test_the_hessian_would_have_been_indefinite_and_the_rest_is_unchanged(self, autodiff):
        params, hparams, train, _ = arrays()
        point = Inputs(*move(autodiff, (params, hparams, train)))
        approximate, exact = (
            products(autodiff, classifier(namespace(autodiff), curvature=c), point) for c in ("gauss-newton", "hessian")
        )
        assert relative_error(approximate[0], exact[0]) > 0.05
        for a, b in zip(approximate[1:3], exact[1:3], strict=True):  # ∂L/∂w and the cross product
            assert relative_error(a, b) <= 1e-12

    def test_cg_converges_where_the_hessian_has_negative_curvature(self, autodiff):
        params, hparams, train, val = move(autodiff, arrays(dtype=np.float32))
        params = {name: 3 * w for name, w in params.items()}
        hparams["decay"] = {name: h - 4 for name, h in hparams["decay"].items()}
        args = {"inner_args": train, "outer_args": val}
        problem = classifier(namespace(autodiff), curvature="hessian")
        with pytest.warns(bl.SolverWarning, match=r"met non-positive curvature.*Gauss-Newton.*bl\.Problem\.from_model"):
            bl.hypergradient(problem, params, hparams, **args, solver=bl.CG(damping=0.0))
        solver = bl.CG(rtol=1e-4, maxiter=400)
        hg = bl.hypergradient(classifier(namespace(autodiff)), params, hparams, solver=solver, **args)
        assert hg.info.status is bl.Status.CONVERGED
        assert autodiff.to_numpy(hg.grad["weight"]).dtype == np.float32

    def test_outputs_that_are_made_of_each_other(self, autodiff):
        """L = ½Σ(z₁ + z₂)² with z₂ = z₁² and z₁ = w λ, so that JᵀHJ = (λ + 2wλ²)²."""
        problem = bl.Problem.from_model(
            lambda w, h, x: {"a": x * w * h, "b": (x * w * h) ** 2},
            lambda z: 0.5 * ((z["a"] + z["b"]) ** 2).sum(),
            lambda w, h: (w**2).sum(),
        )

        def chained(w, h, x):
            z = x * w * h
            return {"a": z, "b": z**2}

        again = bl.Problem.from_model(chained, problem.inner.loss, problem.outer)
        w, h, x = np.array([0.5, -0.3]), np.array([1.5, 2.0]), np.ones(2)
        point = Inputs(*move(autodiff, (w, h, (x,))))
        for each in (problem, again):
            assert relative_error(products(autodiff, each, point)[0], np.diag((h + 2 * w * h**2) ** 2)) <= 1e-13

    def test_what_has_no_curvature_and_what_the_loss_leaves_out(self, autodiff):
        """A loss that is linear in one output, ignores another, and gets integers in a third."""
        xp = namespace(autodiff)

        def model(w, h, x):
            return {"linear": (w * h).sum(), "square": w, "unused": xp.exp(w), "count": (x > 0).sum()}

        problem = bl.Problem.from_model(
            model, lambda z: z["linear"] + (z["square"] ** 2).sum() * z["count"], lambda w, h: (w**2).sum()
        )
        point = Inputs(*move(autodiff, (np.array([1.0, 2.0]), np.array([3.0, 4.0]), (np.array([1.0, 1.0, -1.0]),))))
        matrix, grad, _, _ = products(autodiff, problem, point)
        assert relative_error(matrix, 4 * np.eye(2)) <= 1e-14
        assert relative_error(grad, [7.0, 12.0]) <= 1e-14
        linear = bl.Problem.from_model(lambda w, h, x: w * h, lambda z: z.sum(), problem.outer)
        assert not products(autodiff, linear, point)[0].any()

    def test_a_penalty_that_only_some_weights_have(self, autodiff):
        problem = bl.Problem.from_model(
            lambda w, h, x: x * w["a"],
            lambda z: (z**2).sum(),
            lambda w, h: (w["a"] ** 2).sum(),
            penalty=lambda w, h: (h * w["b"] ** 2).sum(),
        )
        one = np.ones(2)
        point = Inputs(*move(autodiff, ({"a": one, "b": one, "c": one}, 3 * one, (one,))))
        assert relative_error(products(autodiff, problem, point)[0], np.diag([2, 2, 6, 6, 0, 0])) <= 1e-14

    def test_a_check_says_what_gauss_newton_costs(self, autodiff):
        params, hparams, train, val = move(autodiff, arrays())
        args = {"inner_args": train, "outer_args": val, "solver": "exact"}
        with pytest.raises(AssertionError, match="Gauss-Newton leaves out part of the Hessian"):
            check_hypergradient(classifier(namespace(autodiff)), params, hparams, **args)
        check_hypergradient(classifier(namespace(autodiff), curvature="hessian"), params, hparams, **args)

    def test_one_forward_pass_in_torch(self):
        torch = pytest.importorskip("torch")
        problem, calls = classifier(torch), []

        def counted(w, h, x):
            calls.append(1)
            return problem.inner.model(w, h, x)

        counting = bl.Problem.from_model(counted, problem.inner.loss, problem.outer, penalty=problem.inner.penalty)
        params, hparams, train, val = move(bl.get_backend("torch"), arrays())
        args = {"inner_args": train, "outer_args": val, "solver": bl.CG(rtol=1e-10)}
        hg = bl.hypergradient(counting, params, hparams, **args)
        assert hg.info.steps > 5
        assert len(calls) == 1

    def test_a_product_takes_fewer_operations_than_that_of_the_hessian(self):
        """Counted in torch, not timed: matrix products per curvature product."""
        torch = pytest.importorskip("torch")
        from torch.utils._python_dispatch import TorchDispatchMode

        class Count(TorchDispatchMode):
            total = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.total += function.overloadpacket is torch.ops.aten.mm
                return function(*args, **(kwargs or {}))

        backend = bl.get_backend("torch")
        params, hparams, train, _ = move(backend, arrays())
        counts = {}
        for curvature in ("gauss-newton", "hessian"):
            problem = classifier(torch, curvature=curvature)
            found = problem.linearize(backend, params, hparams, train)
            with Count() as count:
                found.vjp_params(params)
            counts[curvature] = count.total
        with Count() as count:
            w = {name: p.clone().requires_grad_() for name, p in params.items()}
            torch.autograd.grad(problem.inner(w, hparams, *train), list(w.values()))
        assert 0 < counts["gauss-newton"] < counts["hessian"]
        assert counts["gauss-newton"] <= 1.5 * count.total

    def test_what_it_needs_is_said(self):
        with pytest.raises(TypeError, match=r"Use\s+bl\.Problem\.from_model\(model, loss, outer\)"):
            bl.Problem(lambda w, h: w, lambda w, h: w, curvature="gauss-newton")
        with pytest.raises(TypeError, match=r"loss: expected a function of \(output, \*targets\), got int"):
            bl.Problem.from_model(lambda w, h, x: w, 3, lambda w, h: w)
        with pytest.raises(TypeError, match=r"penalty: expected a function of \(params, hparams\), got float"):
            bl.Problem.from_model(lambda w, h, x: w, lambda z: z, lambda w, h: w, penalty=0.1)

    def test_without_params_in_the_model(self, autodiff):
        params, hparams, x = move(autodiff, (np.ones(2), np.ones(2), np.ones(2)))
        for penalty in (None, lambda w, h: (w**2).sum()):  # with one, L still depends on params
            problem = bl.Problem.from_model(
                lambda w, h, x: x * h, lambda z: (z**2).sum(), lambda w, h: (w**2).sum(), penalty=penalty
            )
            with pytest.raises(ValueError, match=r"output of model does not depend on params|inner does not depend"):
                bl.hypergradient(problem, params, hparams, inner_args=(x,))

    def test_numpy_objects_bring_their_own(self):
        ridge = bl.problems.ridge()
        problem = bl.Problem.from_model(lambda w, h, x: x @ w, lambda z: z, ridge.outer)
        with pytest.raises(TypeError, match=r'the numpy backend derives no Gauss-Newton products.*curvature="hessian"'):
            bl.hypergradient(
                problem, np.ones(1), np.ones(1), inner_args=(np.eye(1),), outer_args=(np.eye(1), np.ones(1))
            )


def test_an_unknown_curvature_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r'got .gauss_newton.\. Did you mean "gauss-newton"'):
        bl.Problem(lambda w, h: w, lambda w, h: w, curvature="gauss_newton")


@pytest.mark.parametrize("curvature", ["gauss-newton", "finite-differences"])
def test_jit_and_vmap_give_the_same_as_eager(curvature):
    jax = pytest.importorskip("jax")
    problem = classifier(jax.numpy, curvature=curvature)
    cases = [move(bl.get_backend("jax"), arrays(seed)) for seed in range(2)]
    solver = bl.Neumann(terms=3, step_size=0.1)

    def call(params, hparams, train, val):
        args = {"inner_args": train, "outer_args": val, "solver": solver}
        return bl.hypergradient(problem, params, hparams, **args).grad["weight"]

    eager = [call(*case) for case in cases]
    mapped = jax.vmap(call)(*jax.tree.map(lambda *xs: jax.numpy.stack(xs), *cases))
    for case, one, other in zip(cases, eager, mapped, strict=True):
        assert relative_error(jax.jit(call)(*case), one) <= 1e-7
        assert relative_error(other, one) <= 1e-7


@pytest.mark.parametrize("curvature", ["gauss-newton", "finite-differences"])
def test_unrolling_is_the_same_forwards_and_backwards(autodiff, curvature):
    """With Gauss-Newton neither is the derivative of the steps, but both see the same curvature."""
    params, hparams, train, val = move(autodiff, arrays())
    hparams = {"decay": hparams["decay"], "weight": hparams["weight"][:1]}
    train = tuple(part[:1] for part in train)
    problem = classifier(namespace(autodiff), curvature=curvature)
    args = {"inner_args": train, "outer_args": val}
    backwards, forwards = (
        bl.hypergradient(problem, params, hparams, solver=bl.Unrolled(steps=3, step_size=0.01, mode=mode), **args)
        for mode in ("reverse", "forward")
    )
    for name, g in backwards.grad["decay"].items():
        assert relative_error(forwards.grad["decay"][name], g) <= 1e-7
    assert relative_error(forwards.grad["weight"], backwards.grad["weight"]) <= 1e-7


@pytest.mark.parametrize("kind", ["gauss-newton", "finite-differences", "fixed point"])
def test_without_the_garbage_collector_the_graph_is_freed(kind):
    """No reference cycle: memory goes back when the call returns, not when Python finds the time."""
    torch = pytest.importorskip("torch")
    params, hparams, train, val = move(bl.get_backend("torch"), arrays())
    if kind == "fixed point":
        problem = bl.FixedPoint(
            lambda w, h, *_: {name: 0.5 * w[name] + h["decay"][name] * h["weight"].mean() for name in w},
            classifier(torch).outer,
        )
    else:
        problem = classifier(torch, curvature=kind)
    args = {"inner_args": train, "outer_args": val, "solver": bl.Neumann(terms=2, step_size=0.01)}
    bl.hypergradient(problem, params, hparams, **args)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        bl.hypergradient(problem, params, hparams, **args)
        assert sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()) == before
    finally:
        gc.enable()

"""What may stand for the Hessian of the inner objective: Gauss-Newton products, differences of gradients."""

import gc
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
from frameworks import framework, namespace, relative_error
from scipy import linalg

import bilevel as bl
from bilevel.linearization import Inputs
from bilevel.testing import check_hypergradient, exact_hypergradient


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


def arrays(seed=0, samples=10, dtype=np.float64):
    """Return weights, a log decay per weight and log weight per example, inputs, classes, and validation data."""
    rng = np.random.default_rng(seed)
    shapes = {"A": (3, 4), "a": (4,), "B": (4, 3), "b": (3,)}
    params = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    hparams = {
        "decay": {name: rng.standard_normal(shape).astype(dtype) - 1 for name, shape in shapes.items()},
        "weight": rng.standard_normal(samples).astype(dtype),
    }
    x, xv = (rng.standard_normal((samples, 3)).astype(dtype) for _ in range(2))
    y, yv = (np.eye(3, dtype=dtype)[rng.integers(0, 3, samples)] for _ in range(2))
    return params, hparams, (x, y), (xv, yv)


def move(backend, tree):
    if isinstance(tree, dict):
        return {name: move(backend, leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple):
        return tuple(move(backend, leaf) for leaf in tree)
    return backend.from_numpy(tree)


def network(xp):
    def run(w, x):
        return xp.tanh(x @ w["A"] + w["a"]) @ w["B"] + w["b"]

    return run


def cross_entropies(xp, z, y):
    top = xp.amax(z, 1)
    return xp.log(xp.exp(z - top[:, None]).sum(1)) + top - (z * y).sum(1)


@cache  # the same functions for all tests, so that JAX compiles once
def classifier(xp, **options):
    """Return a problem with a decay per weight and a weight per example; Gauss-Newton unless told otherwise."""
    run = network(xp)

    def model(w, h, x):
        return run(w, x), xp.exp(h["weight"])

    def loss(output, y):
        z, weight = output
        return (weight * cross_entropies(xp, z, y)).mean()

    def penalty(w, h):
        return sum((xp.exp(h["decay"][name]) * w[name] ** 2).sum() for name in w)

    def outer(w, h, x, y):
        return cross_entropies(xp, run(w, x), y).mean()

    return bl.Problem.from_model(model, loss, outer, penalty=penalty, **options)


def products(backend, problem, point):
    """Return the matrix of hvp, the gradient, and the cross product and hvp of some vector, as NumPy arrays."""
    found = backend.run(_products, problem, point)
    return [np.asarray(backend.to_numpy(x)) for x in found]


def _products(backend, problem, point):
    space = backend.space(point.params)
    found = problem.linearize(backend, point.params, point.hparams, point.inner_args)
    v = space.normal(1)
    matrix, cross = space.materialise(found.vjp_params), found.vjp_hparams(v)
    return matrix, space.ravel(found.residual), space.ravel(cross), space.ravel(found.vjp_params(v))


def _both_ways(backend, problem, point):
    at, of_params, of_hparams = (backend, *point[:3]), backend.space(point.params), backend.space(point.hparams)
    exact = bl.Problem(problem.inner, problem.outer).linearize(*at)
    u, v = of_hparams.normal(1), of_params.normal(2)
    return of_params.dot(v, problem.linearize(*at).jvp_hparams(u)), of_hparams.dot(u, exact.vjp_hparams(v))


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


class TestFiniteDifferences:
    # The docstring of bilevel.problems.central_differences gives larger errors. This problem is well scaled.
    STATED: ClassVar = {np.float32: 1e-3, np.float64: 1e-8}

    @pytest.mark.parametrize("dtype", STATED)
    def test_products_are_those_of_the_hessian(self, autodiff, dtype):
        params, hparams, train, _ = arrays(dtype=dtype)
        point = Inputs(*move(autodiff, (params, hparams, train)))
        by_differences, exact = (
            products(autodiff, classifier(namespace(autodiff), curvature=c), point)
            for c in ("finite-differences", "hessian")
        )
        for a, b in zip(by_differences, exact, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) <= self.STATED[dtype]

    def test_products_along_hparams_too(self, autodiff):
        """Against the transpose: v·(∂²L/∂w∂λ u) = u·((∂²L/∂w∂λ)ᵀ v)."""
        params, hparams, train, _ = move(autodiff, arrays())
        problem = classifier(namespace(autodiff), curvature="finite-differences")
        along, expected = (float(x) for x in autodiff.run(_both_ways, problem, Inputs(params, hparams, train)))
        assert along == pytest.approx(expected, rel=1e-7)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("exponent", [-30, 30])
    def test_any_scale_of_the_vector_will_do(self, backend, dtype, exponent):
        A = np.array([[2.0, 1.0], [1.0, 3.0]], dtype)
        w, v = np.ones(2, dtype), (np.array([1.0, -2.0]) * 10.0**exponent).astype(dtype)
        problem = quadratic(curvature="finite-differences")
        found = problem.linearize(backend, *move(backend, (w, w, (A,))))
        assert relative_error(backend.to_numpy(found.vjp_params(backend.from_numpy(v))), A @ v) <= self.STATED[dtype]
        assert not backend.to_numpy(found.vjp_params(backend.from_numpy(0 * v))).any()

    def test_a_hypergradient_matches_the_closed_form(self, backend):
        """L = ½wᵀAw − λᵀw and F = ½‖w‖²: dF/dλ = A⁻ᵀ w."""
        A = np.array([[2.0, 1.0], [1.0, 3.0]])
        h = np.array([1.0, -1.0])
        w = linalg.solve(A, h)
        params, hparams, data = move(backend, (w, h, (A,)))
        problem = quadratic(curvature="finite-differences")
        for solver in ("exact", bl.CG(rtol=1e-8), bl.Unrolled(steps=200)):
            hg = bl.hypergradient(problem, params, hparams, inner_args=data, solver=solver)
            assert relative_error(hg.grad, linalg.solve(A, w)) <= 1e-7
        check_hypergradient(problem, params, hparams, inner_args=data, reference="finite-differences")
        assert relative_error(exact_hypergradient(problem, params, hparams, inner_args=data).grad, hg.grad) <= 1e-7

    def test_none_where_hparams_have_no_influence(self, backend):
        problem = bl.Problem(Square(), HalfSquare(), curvature="finite-differences")
        params, hparams = move(backend, (np.ones(2), np.ones(2)))
        found = problem.linearize(backend, params, hparams, ())
        assert found.vjp_hparams(params) is None
        with pytest.raises(ValueError, match="Neither F nor ∂L/∂w depends on hparams"):
            bl.hypergradient(problem, params, hparams)

    def test_an_inner_objective_without_params(self, autodiff):
        problem = bl.Problem(lambda w, h: (h**2).sum(), lambda w, h: (w**2).sum(), curvature="finite-differences")
        with pytest.raises(ValueError, match="inner does not depend on params"):
            bl.hypergradient(problem, *move(autodiff, (np.ones(2), np.ones(2))))

    def test_an_inner_objective_that_is_no_scalar(self, autodiff):
        problem = bl.Problem(lambda w, h: w * h, lambda w, h: (w**2).sum(), curvature="finite-differences")
        with pytest.raises(ValueError, match="inner: expected a scalar"):
            bl.hypergradient(problem, *move(autodiff, (np.ones(2), np.ones(2))))

    def test_coarse_dtypes_are_refused_by_name(self):
        torch = pytest.importorskip("torch")
        problem = bl.Problem(lambda w, h: (w["a"] * h).sum(), lambda w, h: w["a"].sum(), curvature="finite-differences")
        with pytest.raises(TypeError, match=r"params\['a'\] is torch\.bfloat16, which is too coarse for differences"):
            bl.hypergradient(problem, {"a": torch.ones(2, dtype=torch.bfloat16)}, torch.ones(2))

    def test_numpy_objects_need_two_gradients(self):
        class NoGradHparams(Quadratic):
            grad_hparams = property()

        problem = bl.Problem(NoGradHparams(), HalfSquare(), curvature="finite-differences")
        w, A = np.ones(2), np.eye(2)
        with pytest.raises(TypeError, match=r"inner objective \(NoGradHparams\) has no method 'grad_hparams'"):
            bl.hypergradient(problem, w, w, inner_args=(A,))


class Quadratic:
    """L = ½wᵀAw − λᵀw."""

    def __call__(self, w, h, A):
        return 0.5 * w @ (A @ w) - h @ w

    def grad(self, w, h, A):
        return A @ w - h

    def grad_hparams(self, w, h, A):
        return -w


class Square:
    def __call__(self, w, h):
        return w @ w

    def grad(self, w, h):
        return 2 * w

    def grad_hparams(self, w, h):
        return None


class HalfSquare:
    def __call__(self, w, h):
        return 0.5 * w @ w

    def grad(self, w, h):
        return w, None


def quadratic(**options):
    return bl.Problem(Quadratic(), HalfSquare(), **options)


class TestOnceDifferentiableTorch:
    """What torch cannot differentiate twice: flash attention, and modules compiled with AOT autograd."""

    @pytest.fixture
    def attention(self):
        torch = pytest.importorskip("torch")
        F = torch.nn.functional
        torch.manual_seed(0)

        class Attention(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mix, self.read = torch.nn.Linear(4, 12), torch.nn.Linear(4, 1)

            def forward(self, x):
                q, k, v = self.mix(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
                return self.read(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)

        return Attention().double()

    @staticmethod
    def case(module, run=None, **options):
        torch = pytest.importorskip("torch")
        run = run or (lambda w, x: torch.func.functional_call(module, w, (x,)))

        def inner(w, h, x, y):
            return ((run(w, x) - y) ** 2).mean() + sum((h[name].exp() * w[name] ** 2).sum() for name in w)

        def outer(w, h, x, y):
            return ((run(w, x) - y) ** 2).mean()

        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 5, 4), (6, 1)))
        w = dict(module.named_parameters())
        h = {name: torch.full_like(p, -2.0) for name, p in w.items()}
        args = {"inner_args": (x, y), "outer_args": (x, y), "solver": bl.CG(damping=10.0, rtol=1e-7)}
        return (bl.Problem(inner, outer, **options), w, h), args

    def test_flash_attention(self, attention):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        (problem, w, h), args = self.case(attention)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            with pytest.raises(RuntimeError, match=r'(?s)MATH.*curvature="finite-differences".*is not implemented'):
                bl.hypergradient(problem, w, h, **args)
            problem = bl.Problem(problem.inner, problem.outer, curvature="finite-differences")
            by_differences = bl.hypergradient(problem, w, h, **args)
        with sdpa_kernel(SDPBackend.MATH):
            exact = bl.hypergradient(bl.Problem(problem.inner, problem.outer), w, h, **args)
        for name in w:
            assert relative_error(by_differences.grad[name], exact.grad[name]) <= 1e-5

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
    def test_a_compiled_module(self):
        torch = pytest.importorskip("torch")
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Flatten(1), torch.nn.Linear(20, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
        )
        compiled = torch.compile(module.double(), backend="aot_eager")

        def run(w, x):
            return torch.func.functional_call(compiled, {f"_orig_mod.{name}": p for name, p in w.items()}, (x,))

        (problem, w, h), args = self.case(module, run)
        with pytest.raises(RuntimeError, match=r'(?s)curvature="finite-differences".*create_graph=False'):
            bl.hypergradient(problem, w, h, **args)
        problem = bl.Problem(problem.inner, problem.outer, curvature="finite-differences")
        by_differences = bl.hypergradient(problem, w, h, **args)
        exact = bl.hypergradient(*self.case(module)[0], **args)
        for name in w:
            assert relative_error(by_differences.grad[name], exact.grad[name]) <= 1e-5

    def test_a_module_that_runs_itself_is_refused(self, attention):
        case, args = self.case(attention, run=lambda w, x: attention(x), curvature="finite-differences")
        with pytest.raises(ValueError, match=r"inner computes with the arrays of params, not.*functional_call"):
            bl.hypergradient(*case, **args)

    def test_nothing_of_the_users_is_touched(self, attention):
        import torch

        (problem, w, h), args = self.case(attention, curvature="finite-differences")
        for p in w.values():
            p.grad = torch.ones_like(p)
        before = {name: p.detach().clone() for name, p in w.items()}
        hg = bl.hypergradient(problem, w, h, **args)
        for name, p in w.items():
            assert torch.equal(p.detach(), before[name])
            assert torch.equal(p.grad, torch.ones_like(p))
            assert not hg.grad[name].requires_grad


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

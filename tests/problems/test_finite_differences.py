"""Differences of gradients for products with the Hessian: against the Hessian, and where torch has no other way."""

from typing import ClassVar

import numpy as np
import pytest
from frameworks import framework, namespace, relative_error
from scipy import linalg
from tanh_classifier import arrays, both_ways, classifier, move, products

import bilevel as bl
from bilevel.linearization import Inputs
from bilevel.testing import check_hypergradient, exact_hypergradient


@pytest.fixture(params=["torch", "jax"])
def autodiff(request):
    return framework(request.param)


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
        along, expected = (float(x) for x in autodiff.run(both_ways, problem, Inputs(params, hparams, train)))
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
    """PyTorch differentiates flash attention and compiled modules only once."""

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

"""Unrolling: both modes, both optimizers, checkpoints, truncation and batches, against independent derivatives."""

import gc
import itertools
import weakref

import numpy as np
import pytest
from cases import quadratic
from frameworks import DTYPES, framework, relative_error, tolerance
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg

import bilevel as bl
from bilevel import Status
from bilevel.linearization import LinearizedMap
from bilevel.spaces.tree import leaves_with_paths

OPTIMIZERS = {
    "descent": {"step_size": 0.08},
    "heavy ball": {"step_size": 0.05, "momentum": 0.6},
    "adam": {"optimizer": "adam", "step_size": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
}
WAYS = {
    "reverse": {"mode": "reverse", "checkpoint": False},
    "checkpointed": {"mode": "reverse", "checkpoint": True},
    "forward": {"mode": "forward"},
}


class QuarticInner:
    """L = ½ mean (Xw − y)² + ¼ Σ w⁴ + ½ Σ (Sλ)² w²: its Hessian and its cross derivative depend on w and λ."""

    def __call__(self, w, h, X, y, S):
        return 0.5 * ((X @ w - y) ** 2).sum() / len(y) + (w**4).sum() / 4 + ((S @ h) ** 2 * w**2).sum() / 2

    def grad(self, w, h, X, y, S):
        return X.T @ (X @ w - y) / len(y) + w**3 + (S @ h) ** 2 * w

    def hvp(self, w, h, v, X, y, S):
        return X.T @ (X @ v) / len(y) + (3 * w**2 + (S @ h) ** 2) * v

    def cross_vjp(self, w, h, v, X, y, S):
        return S.T @ (2 * (S @ h) * w * v)

    def cross_jvp(self, w, h, u, X, y, S):
        return 2 * (S @ h) * w * (S @ u)


class QuarticOuter:
    """F = ½ ‖w − t‖² + dᵀλ."""

    def __call__(self, w, h, t, d):
        return ((w - t) ** 2).sum() / 2 + d @ h

    def grad(self, w, h, t, d):
        return w - t, d


PROBLEM = bl.Problem(QuarticInner(), QuarticOuter())
STEPS = 11  # no square


class Quartic:
    """Data for the problem above: three batches, six weights, four hyperparameters."""

    def __init__(self, seed=0, dtype=np.float64):
        rng = np.random.default_rng(seed)
        S = rng.standard_normal((6, 4))
        arrays = [(rng.standard_normal((8, 6)), rng.standard_normal(8), S) for _ in range(3)]
        self.batches = [tuple(a.astype(dtype) for a in batch) for batch in arrays]
        self.w, self.h, self.t, self.d = (rng.standard_normal(k).astype(dtype) for k in (6, 4, 6, 4))
        self.h *= 0.3

    def hypergradient(self, backend, batches, w=None, h=None, **options):
        """Unroll in a framework; None for ``batches``: the first one, as a tuple."""
        args = [tuple(map(backend.from_numpy, batch)) for batch in self.batches[: batches or 1]]
        return bl.hypergradient(
            PROBLEM,
            backend.from_numpy(self.w if w is None else w),
            backend.from_numpy(self.h if h is None else h),
            inner_args=args[0] if batches is None else args,
            outer_args=tuple(map(backend.from_numpy, (self.t, self.d))),
            solver=bl.Unrolled(**{"steps": STEPS, **options}),
            backend=backend,
            on_failure="ignore",
        )

    def by_hand(self, batches, steps=STEPS, truncation=None, optimizer="descent", **options):
        """Return w_K, F and dF/dλ of a plain loop in float64, by complex steps: no difference is taken."""
        grad = np.empty(4)
        for j in range(4):
            w, value = self._loop(batches, j, steps, truncation or steps, optimizer, **options)
            grad[j] = value.imag / 1e-30
        return w.real, value.real, grad

    def _loop(self, batches, j, steps, last, optimizer, step_size, momentum=0.0, beta1=0.0, beta2=0.0, eps=0.0):
        plain, moved = self.h.astype(complex), self.h.astype(complex)
        moved[j] += 1e-30j
        w, m, v = self.w.astype(complex), np.zeros(6, complex), np.zeros(6, complex)
        data = [tuple(a.astype(float) for a in batch) for batch in self.batches[: batches or 1]]
        for i in range(steps):
            g = PROBLEM.inner.grad(w, plain if i < steps - last else moved, *data[i % len(data)])
            if optimizer == "adam":
                m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
                w = w - step_size * (m / (1 - beta1 ** (i + 1))) / (np.sqrt(v / (1 - beta2 ** (i + 1))) + eps)
            else:
                m = momentum * m + g
                w = w - step_size * m
        return w, PROBLEM.outer(w, moved, self.t.astype(float), self.d.astype(float))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("batches", "truncation"), [(None, None), (3, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_differentiates_the_program(backend, way, optimizer, batches, truncation, dtype):
    """Against complex steps through the same loop, written out: the same grad, end and value."""
    case, options = Quartic(dtype=dtype), {**OPTIMIZERS[optimizer], "truncation": truncation}
    hg = case.hypergradient(backend, batches, **options, **WAYS[way])
    params, value, grad = case.by_hand(batches, **options)
    assert relative_error(backend.to_numpy(hg.grad), grad) <= tolerance(dtype, condition=20)
    assert relative_error(backend.to_numpy(hg.params), params) <= tolerance(dtype)
    assert relative_error(backend.to_host(hg.value), value) <= tolerance(dtype)
    for tree in (hg.grad, hg.adjoint, hg.params, hg.value):
        assert backend.to_numpy(tree).dtype == dtype
    assert hg.info.steps == STEPS
    assert hg.info.status is Status.CONVERGED


@pytest.mark.parametrize("name", ["numpy", "torch"])  # in JAX, each compiles
@pytest.mark.parametrize(("batches", "truncation"), [(1, None), (3, None), (2, 1), (None, 20)])
def test_it_differentiates_the_program_with_any_batches_and_truncation(name, batches, truncation):
    backend, case = framework(name), Quartic()
    for optimizer, way in itertools.product(OPTIMIZERS.values(), WAYS.values()):
        hg = case.hypergradient(backend, batches, truncation=truncation, **optimizer, **way)
        expected = case.by_hand(batches, truncation=truncation and min(truncation, STEPS), **optimizer)[2]
        assert relative_error(backend.to_numpy(hg.grad), expected) <= 1e-12


def test_the_batches_matter():
    """Else the test above would not tell a wrong one."""
    numpy, case = framework("numpy"), Quartic()
    grads = [case.hypergradient(numpy, batches, step_size=0.05).grad for batches in (None, 2, 3)]
    assert all(relative_error(a, b) > 0.01 for a, b in itertools.combinations(grads, 2))


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 30),
    truncation=st.none() | st.integers(1, 30),
    batches=st.sampled_from([None, 1, 2, 3]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_all_ways_agree_and_what_is_stored_to_the_bit(name, seed, steps, truncation, batches, optimizer):
    backend, case = framework(name), Quartic(seed)
    options = {**OPTIMIZERS[optimizer], "steps": steps, "truncation": truncation}
    plain, checkpointed, forward = (case.hypergradient(backend, batches, **options, **way) for way in WAYS.values())
    iterates = case.hypergradient(backend, batches, **options)  # in torch, plain keeps graphs
    for other in (checkpointed, iterates):
        for a, b in zip(plain[:4], other[:4], strict=True):
            assert (backend.to_numpy(a) == backend.to_numpy(b)).all()
        assert plain.info == other.info
    scale = 1 + np.linalg.norm(backend.to_numpy(plain.grad))
    if np.isfinite(scale):  # w⁴ may drive a drawn start apart
        difference = backend.to_numpy(plain.grad) - backend.to_numpy(forward.grad)
        assert np.linalg.norm(difference) <= 1e-9 * scale


def test_checkpoints_agree_in_jax_to_rounding():
    jax, case = framework("jax"), Quartic()
    options = {**OPTIMIZERS["adam"], "truncation": 9}  # a square: no steps left over
    plain, checkpointed = (case.hypergradient(jax, 3, **options, checkpoint=c) for c in (False, True))
    for a, b in zip(plain[:4], checkpointed[:4], strict=True):
        assert relative_error(jax.to_numpy(b), jax.to_numpy(a)) <= 1e-13


class Counter:
    """How many arrays of n entries are alive, and the most that ever were."""

    def __init__(self, n):
        self.n, self.live, self.peak = n, 0, 0

    def counted(self, tree):
        for _, leaf in leaves_with_paths(tree):
            if isinstance(leaf, np.ndarray) and leaf.size == self.n:
                self.live += 1
                self.peak = max(self.peak, self.live)
                weakref.finalize(leaf, self._drop)
        return tree

    def _drop(self):
        self.live -= 1


class CountingSpace(type(framework("numpy").space(np.zeros(1)))):
    """A space whose results are counted while they live; axpy and scale are maps."""

    def __init__(self, like, counter):
        super().__init__(like)
        self.counter = counter

    def map(self, function, x, *rest):
        return self.counter.counted(super().map(function, x, *rest))


class TestMemory:
    """In live trees like params: iterates, and with Adam its two averages for each."""

    @staticmethod
    def peak(steps, optimizer, **way):
        counter = Counter(6)

        class Counting(type(framework("numpy"))):
            def space(self, tree):
                return CountingSpace(tree, counter)

        Quartic().hypergradient(Counting(), None, **OPTIMIZERS[optimizer], **{"steps": steps, **way})
        return counter.peak

    @pytest.mark.parametrize(("optimizer", "stored", "at_start"), [("heavy ball", 1, 2), ("adam", 3, 3)])
    def test_it_is_what_is_claimed(self, optimizer, stored, at_start):
        around = 16  # what one step needs: adjoint, derivatives, averages
        for steps in (50, 200, 450):
            plain, checkpointed, forward = (self.peak(steps, optimizer, **way) for way in WAYS.values())
            assert stored * steps <= plain <= stored * steps + around
            assert checkpointed <= at_start * (3 * steps**0.5 + 1) + around
            assert forward <= 2 * 4 * at_start + around + 10  # old and new tangents of four hyperparameters

    def test_auto_is_on_where_steps_are_many(self):
        few, many = self.peak(99, "heavy ball"), self.peak(100, "heavy ball")
        assert few >= 99
        assert many <= 75
        assert self.peak(200, "heavy ball", truncation=20) <= 40  # what counts is what is differentiated

    def test_in_jax_the_compiled_program_needs_less(self):
        jax = pytest.importorskip("jax")
        jnp, n, steps = jax.numpy, 2000, 225

        def temporaries(checkpoint):
            solver = bl.Unrolled(steps=steps, step_size=0.1, checkpoint=checkpoint)
            problem = bl.Problem(lambda w, h: (w**4).sum() + h * (w**2).sum(), lambda w, h: (w**2).sum())
            call = jax.jit(lambda w, h: bl.hypergradient(problem, w, h, solver=solver).grad)
            compiled = call.lower(jnp.ones(n), jnp.ones(())).compile()
            return compiled.memory_analysis().temp_size_in_bytes / (8 * n)

        assert temporaries(False) >= steps
        assert temporaries(True) <= 3 * 15 + 1 + 15

    def test_no_tensor_outlives_a_call_without_the_garbage_collector(self):
        torch = pytest.importorskip("torch")
        case, backend = Quartic(), framework("torch")

        def live():
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        for way, optimizer in zip(WAYS.values(), OPTIMIZERS.values(), strict=True):
            gc.collect()
            gc.disable()
            try:
                before = live()
                case.hypergradient(backend, 2, **way, **optimizer)
                assert live() == before
            finally:
                gc.enable()


class TestStationaryPoint:
    @given(seed=st.integers(0, 2**32 - 1), terms=st.sampled_from([1, 2, 7]), share=st.floats(0.1, 1.9))
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["numpy", "torch"])
    def test_unrolled_steps_are_neumann_terms(self, name, way, seed, terms, share):
        self.compare(framework(name), way, seed, terms, share)

    @pytest.mark.parametrize("way", WAYS)
    def test_unrolled_steps_are_neumann_terms_in_jax_too(self, way):
        for share in (0.3, 1.7):
            self.compare(framework("jax"), way, 0, 7, share)

    def compare(self, backend, way, seed, terms, share):
        """Theorem 2 of Lorraine et al. (2020): K steps sum the first K terms."""
        case = quadratic(backend, seed=seed).at
        series = bl.Neumann(terms=terms - 1, step_size=share / 4)
        unrolled = bl.Unrolled(steps=terms, step_size=share / 4, **WAYS[way])
        a, b = (bl.hypergradient(*case, solver=s) for s in (series, unrolled))
        for x, y in ((a.grad, b.grad), (a.adjoint, b.adjoint)):
            assert relative_error(backend.to_numpy(y), backend.to_numpy(x)) <= 1e-12

    def test_truncation_drops_the_early_steps(self, backend):
        case = quadratic(backend).at
        for way in WAYS.values():
            truncated = bl.Unrolled(steps=20, step_size=0.2, truncation=4, **way)
            short = bl.Unrolled(steps=4, step_size=0.2, **way)
            a, b = (bl.hypergradient(*case, solver=s) for s in (truncated, short))
            assert relative_error(backend.to_numpy(a.grad), backend.to_numpy(b.grad)) <= 1e-11

    @pytest.mark.parametrize("way", WAYS)
    def test_the_end_of_an_unroll_is_returned(self, backend, way):
        case = quadratic(backend, away=1.0)
        hg = case.hypergradient(bl.Unrolled(steps=300, **WAYS[way]))
        assert relative_error(backend.to_numpy(hg.params), case.minimum) <= 1e-10
        expected = linalg.solve(case.matrix, case.minimum - case.target)
        assert relative_error(backend.to_numpy(hg.adjoint), expected) <= 1e-10

    def test_the_adjoint_takes_the_batches_in_their_order(self, backend):
        """All have their minimum at w = λ, so that forward mode's, of steps taken at the end, is reverse mode's."""

        class Inner:  # ½ ‖X (w − λ)‖²
            def __call__(self, w, h, X):
                return ((X @ (w - h)) ** 2).sum() / 2

            def grad(self, w, h, X):
                return X.T @ (X @ (w - h))

            def hvp(self, w, h, v, X):
                return X.T @ (X @ v)

            def cross_vjp(self, w, h, v, X):
                return -X.T @ (X @ v)

            cross_jvp = cross_vjp

        rng = np.random.default_rng(0)
        batches = [(backend.from_numpy(rng.standard_normal((4, 3))),) for _ in range(3)]
        w, problem = backend.from_numpy(rng.standard_normal(3)), bl.Problem(Inner(), SquaredNorm())
        reverse, forward = (
            bl.hypergradient(
                problem,
                w,
                w + 0,
                inner_args=batches,
                solver=bl.Unrolled(steps=7, step_size=0.1, mode=mode),
                on_failure="ignore",
            )
            for mode in ("reverse", "forward")
        )
        for a, b in ((reverse.adjoint, forward.adjoint), (reverse.grad, forward.grad)):
            assert relative_error(backend.to_numpy(b), backend.to_numpy(a)) <= 1e-12
        assert forward.info.residual_norm == pytest.approx(reverse.info.residual_norm, rel=1e-12)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_the_residual_is_that_of_the_adjoint(self, way, optimizer):
        """Exactly, where the Hessian is constant; far from convergence, so that it is far from zero."""
        numpy = framework("numpy")
        case = quadratic(numpy, away=1.0)
        solver = bl.Unrolled(steps=5, **{**OPTIMIZERS[optimizer], "step_size": 0.02}, **WAYS[way])
        hg = case.hypergradient(solver)
        residual = np.linalg.norm(hg.params - case.target - case.matrix @ hg.adjoint)
        assert hg.info.residual_norm == pytest.approx(residual, rel=1e-12)
        assert hg.info.rhs_norm == pytest.approx(np.linalg.norm(hg.params - case.target), rel=1e-12)
        assert residual > 0.1 * hg.info.rhs_norm


class Tiny:
    """L = ½ scale ‖w − λ‖²."""

    def __call__(self, w, h, scale):
        return scale * ((w - h) ** 2).sum() / 2

    def grad(self, w, h, scale):
        return scale * (w - h)

    def hvp(self, w, h, v, scale):
        return scale * v

    def cross_vjp(self, w, h, v, scale):
        return -scale * v

    cross_jvp = cross_vjp


class SquaredNorm:
    """F = ½ ‖w‖²."""

    def __call__(self, w, h):
        return (w**2).sum() / 2

    def grad(self, w, h):
        return w, None


TINY = bl.Problem(Tiny(), SquaredNorm())


class TestAdam:
    def test_auto_is_a_thousandth(self, backend):
        case = Quartic()
        auto, explicit = (case.hypergradient(backend, None, optimizer="adam", **o) for o in ({}, {"step_size": 1e-3}))
        assert (backend.to_numpy(auto.grad) == backend.to_numpy(explicit.grad)).all()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_gradients_have_the_true_derivative(self, backend, way, dtype):
        """One entry starts at its minimum, where dw_1/dλ = α/eps; the other has no gradient at all."""

        class Inner:
            def __call__(self, w, h):
                return ((w - h) ** 2 * mask).sum() / 2

            def grad(self, w, h):
                return mask * (w - h)

            def hvp(self, w, h, v):
                return mask * v

            def cross_vjp(self, w, h, v):
                return -mask * v

            cross_jvp = cross_vjp

        mask = backend.from_numpy(np.array([1.0, 0.0], dtype))
        problem = bl.problems.quadratic(
            *(backend.from_numpy(a.astype(dtype)) for a in (np.eye(2), np.eye(2), np.ones(2)))
        )
        w, h = (backend.from_numpy(np.array([3.0, 5.0], dtype)) for _ in range(2))
        solver = bl.Unrolled(steps=1, optimizer="adam", step_size=0.25, eps=0.125, **WAYS[way])
        hg = bl.hypergradient(bl.Problem(Inner(), problem.outer), w, h, solver=solver)
        assert backend.to_numpy(hg.params).tolist() == [3.0, 5.0]
        assert backend.to_numpy(hg.grad) == pytest.approx([(3 - 1) * 0.25 / 0.125, 0.0], rel=tolerance(dtype))

    @pytest.mark.parametrize("way", WAYS)
    def test_tiny_gradients_do_not_overflow(self, backend, way):
        """Squares of which underflow in float32."""
        w, h = (backend.from_numpy(np.array(a, np.float32)) for a in ([3.0, 5.0], [1.0, 2.0]))
        for scale in (1e-12, 1e-18, 1e-22, 1e-30):
            args = (backend.from_numpy(np.array(scale, np.float32)),)
            solver = bl.Unrolled(steps=3, optimizer="adam", **WAYS[way])
            hg = bl.hypergradient(TINY, w, h, inner_args=args, solver=solver, on_failure="ignore")
            assert np.isfinite(backend.to_numpy(hg.grad)).all()
            # w moves by α ∂L/∂w / (|∂L/∂w| + eps), eps = 1e-8, which is linear in a gradient as small as this
            if scale <= 1e-18:
                assert backend.to_numpy(hg.grad) == pytest.approx(
                    np.array([3.0, 5.0]) * 3e-3 * scale / 1e-8, rel=1e-2, abs=0
                )

    def test_float32_keeps_the_bias_correction(self, backend):
        """1 − 0.999 has lost four digits in float32; from there on the error of the step must not grow."""
        case, options = Quartic(dtype=np.float32), {"optimizer": "adam", "step_size": 0.05, "steps": 3}
        hg = case.hypergradient(backend, None, **options)
        params, _, _ = case.by_hand(None, **options, beta1=0.9, beta2=0.999, eps=1e-8)
        assert relative_error(backend.to_numpy(hg.params), params) <= 1e-6


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


class TestCrossProducts:
    """jvp_hparams is the transpose of vjp_hparams: ⟨v, C u⟩ = ⟨Cᵀ v, u⟩."""

    @staticmethod
    def check(backend, problem, params, hparams, args):
        left, right = (backend.to_numpy(x) for x in backend.run(_products, problem, params, hparams, args))
        assert left == pytest.approx(right, rel=1e-10)
        assert abs(left) > 1e-6

    @pytest.mark.parametrize("kind", ["ridge", "logistic_regression"])
    @pytest.mark.parametrize("shape", [(), (5,), (5, 3), "groups"])
    def test_of_the_ready_problems(self, backend, kind, shape):
        rng = np.random.default_rng(0)
        y = rng.standard_normal((9, 3)) if kind == "ridge" else rng.integers(0, 3, 9)
        args = tuple(map(backend.from_numpy, (rng.standard_normal((9, 5)), y)))
        groups, shape = ([0, 1, 1, 0, 1], (2,)) if shape == "groups" else (None, shape)
        problem = getattr(bl.problems, kind)(groups)
        w, h = (backend.from_numpy(np.asarray(rng.standard_normal(s))) for s in ((5, 3), shape))
        self.check(backend, problem, w, h, args)

    def test_of_the_quadratic(self, backend):
        problem, w, lam = quadratic(backend).at
        self.check(backend, problem, w, lam, ())

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_of_trees_with_leaves_that_do_not_meet(self, name):
        backend = framework(name)
        rng = np.random.default_rng(0)
        a, b, c, d, e = (backend.from_numpy(rng.standard_normal(3)) for _ in range(5))

        def inner(p, h):  # ∂L/∂c is constant, h["e"] without influence, ∂L/∂a linear in h["d"]
            return (p["a"] ** 2 * h["d"] + (p["b"] ** 4)).sum() + p["c"].sum() + (p["b"] * h["d"] ** 3).sum()

        problem, params, hparams = bl.Problem(inner, inner), {"a": a, "b": b, "c": c}, {"d": d, "e": e}
        self.check(backend, problem, params, hparams, ())
        u = {"d": e, "e": d}
        product = backend.run(_cross_jvp, problem, params, hparams, u)
        assert backend.to_numpy(product["a"]) == pytest.approx(backend.to_numpy(2 * a * e))
        assert backend.to_numpy(product["b"]) == pytest.approx(backend.to_numpy(3 * d**2 * e))
        assert backend.to_numpy(product["c"]).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("name", ["torch", "jax"])
    def test_where_there_is_no_influence(self, name):
        backend = framework(name)
        w, h = (backend.from_numpy(np.arange(3.0)) for _ in range(2))
        for inner in (lambda w, h: (w**2).sum(), lambda w, h: w.sum()):
            problem = bl.Problem(inner, lambda w, h: (w * h).sum())
            product = backend.run(_cross_jvp, problem, w, h, h)
            assert backend.to_numpy(product).tolist() == [0, 0, 0]
            with pytest.warns(bl.DependenceWarning, match="has no influence on the minimum"):
                hg = bl.hypergradient(problem, w, h, solver=bl.Unrolled(steps=2, step_size=0.25, mode="forward"))
            assert backend.to_numpy(hg.grad).tolist() == backend.to_numpy(hg.params).tolist()


def _products(backend, problem, params, hparams, args):
    at, of_params, of_hparams = (
        backend.inner(problem.inner, params, hparams, args),
        *map(backend.space, (params, hparams)),
    )
    v, u = of_params.normal(1), of_hparams.normal(2)
    return of_params.dot(v, at.jvp_hparams(u)), of_hparams.dot(at.vjp_hparams(v), u)


def _cross_jvp(backend, problem, params, hparams, u):
    return backend.inner(problem.inner, params, hparams, ()).jvp_hparams(u)


def test_the_gradient_alone_is_that_of_the_derivatives(backend):
    case = Quartic()
    at = (*map(backend.from_numpy, (case.w, case.h)), tuple(map(backend.from_numpy, case.batches[0])))
    alone, among = backend.run(_gradients, PROBLEM, *at)
    assert relative_error(backend.to_numpy(alone), backend.to_numpy(among)) <= 1e-14


def _gradients(backend, problem, *at):
    return problem.value_and_residual(backend, *at)[1], backend.inner(problem.inner, *at).residual


SIZES = {"a": (4, 5), "b": (4,), "c": (3, 4)}
DATA = [np.random.default_rng(i).standard_normal((2, 10, 5)) for i in range(3)]


class TestAgainstAutograd:
    """A hand-written unroll of a small network, differentiated by the framework itself."""

    @staticmethod
    def trees(make):
        rng = np.random.default_rng(7)
        params = {k: make(rng.standard_normal(s) / 2) for k, s in SIZES.items()}
        return params, {"decay": make(np.array(-1.0)), "weights": make(rng.standard_normal(10) / 3)}

    @staticmethod
    def losses(xp):
        def errors(p, x, y):
            return (xp.tanh(x @ p["a"].T + p["b"]) @ p["c"].T - y[:, :3]) ** 2

        def inner(p, h, x, y):
            penalty = xp.exp(h["decay"]) * sum((leaf**2).sum() for leaf in p.values())
            return (xp.exp(h["weights"]) * errors(p, x, y).sum(1)).mean() + 0.05 * penalty

        return inner, lambda p, h, x, y: errors(p, x, y).mean()

    @staticmethod
    def unroll(grad, p, h, data, xp, steps, optimizer="descent", step_size=0.0, momentum=0.0, beta1=0, beta2=0, eps=0):
        m = {k: 0 * w for k, w in p.items()}
        v = dict(m)
        for i in range(steps):
            g = grad(p, h, *data[i % len(data)])
            if optimizer == "adam":
                m = {k: beta1 * m[k] + (1 - beta1) * g[k] for k in p}
                v = {k: beta2 * v[k] + (1 - beta2) * g[k] ** 2 for k in p}
                hat = {k: (m[k] / (1 - beta1 ** (i + 1)), v[k] / (1 - beta2 ** (i + 1))) for k in p}
                p = {k: p[k] - step_size * hat[k][0] / (xp.sqrt(hat[k][1]) + eps) for k in p}
            else:
                m = {k: momentum * m[k] + g[k] for k in p}
                p = {k: p[k] - step_size * m[k] for k in p}
        return p

    @pytest.mark.parametrize("optimizer", ["heavy ball", "adam"])
    def test_torch(self, optimizer):
        torch = pytest.importorskip("torch")
        inner, outer = self.losses(torch)
        params, hparams = self.trees(torch.tensor)
        data = [tuple(map(torch.tensor, d)) for d in DATA]

        def grad(p, h, x, y):
            return dict(
                zip(p, torch.autograd.grad(inner(p, h, x, y), list(p.values()), create_graph=True), strict=True)
            )

        start = {k: w.clone().requires_grad_() for k, w in params.items()}
        hypers = {k: h.clone().requires_grad_() for k, h in hparams.items()}
        end = self.unroll(grad, start, hypers, data[:2], torch, 7, **OPTIMIZERS[optimizer])
        expected = torch.autograd.grad(outer(end, hypers, *data[2]), list(hypers.values()))
        self.compare(framework("torch"), inner, outer, params, hparams, data, optimizer, end, expected)

    def test_jax(self):
        optimizer = "adam"
        jax = pytest.importorskip("jax")
        inner, outer = self.losses(jax.numpy)
        params, hparams = self.trees(jax.numpy.asarray)
        data = [tuple(map(jax.numpy.asarray, d)) for d in DATA]

        @jax.jit
        def run(h):
            end = self.unroll(jax.grad(inner), params, h, data[:2], jax.numpy, 7, **OPTIMIZERS[optimizer])
            return outer(end, h, *data[2]), end

        expected, end = jax.grad(run, has_aux=True)(hparams)
        self.compare(framework("jax"), inner, outer, params, hparams, data, optimizer, end, list(expected.values()))

    def compare(self, backend, inner, outer, params, hparams, data, optimizer, end, expected):
        for way in WAYS.values():
            hg = bl.hypergradient(
                bl.Problem(inner, outer),
                params,
                hparams,
                inner_args=data[:2],
                outer_args=data[2],
                solver=bl.Unrolled(steps=7, **OPTIMIZERS[optimizer], **way),
            )
            for k, w in end.items():
                assert relative_error(backend.to_numpy(hg.params[k]), backend.to_numpy(w)) <= 1e-13
            for g, e in zip(hg.grad.values(), expected, strict=True):
                assert relative_error(backend.to_numpy(g), backend.to_numpy(e)) <= 1e-11

    def test_the_steps_are_those_of_torchs_adam(self):
        torch = pytest.importorskip("torch")
        inner, outer = self.losses(torch)
        params, hparams = self.trees(torch.tensor)
        x, y = map(torch.tensor, DATA[0])
        own = {k: w.clone().requires_grad_() for k, w in params.items()}
        optimizer = torch.optim.Adam(own.values(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            inner(own, hparams, x, y).backward()
            optimizer.step()
        hg = bl.hypergradient(
            bl.Problem(inner, outer),
            params,
            hparams,
            inner_args=(x, y),
            outer_args=(x, y),
            solver=bl.Unrolled(steps=20, optimizer="adam", step_size=1e-2),
            on_failure="ignore",
        )
        for k, w in own.items():
            assert torch.allclose(hg.params[k], w, rtol=1e-12)


class TestJax:
    @pytest.mark.parametrize(
        "options",
        [{"mode": "forward"}, {"checkpoint": True, "optimizer": "adam", "eps": 1e-2}],
        ids=["forward", "checkpointed adam"],
    )
    def test_jit_and_vmap(self, options):
        jax = pytest.importorskip("jax")
        backend, cases = framework("jax"), [Quartic(seed) for seed in range(3)]

        def call(w, h, batches, outer, step_size):
            solver = bl.Unrolled(steps=5, step_size=step_size, **options)
            return bl.hypergradient(PROBLEM, w, h, inner_args=batches, outer_args=outer, solver=solver)

        arguments = [jax.tree.map(jax.numpy.asarray, (c.w, c.h, c.batches, (c.t, c.d))) for c in cases]
        stacked = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *arguments)
        sizes = jax.numpy.asarray([0.01, 0.02, 0.05])
        mapped = jax.jit(jax.vmap(call))(*stacked, sizes)
        for i, (case, size) in enumerate(zip(cases, sizes, strict=True)):
            one = case.hypergradient(backend, 3, steps=5, step_size=float(size), **options)
            assert relative_error(mapped.grad[i], one.grad) <= 1e-12
            assert relative_error(mapped.adjoint[i], one.adjoint) <= 1e-12
            assert int(mapped.info.status[i]) == one.info.status
            assert int(mapped.info.steps[i]) == 5

    def test_new_numbers_do_not_trace_again(self):
        jax = pytest.importorskip("jax")
        traces = []

        def inner(w, h, x):
            traces.append(1)
            return ((w - h) ** 2 * x).sum()

        problem, counts = bl.Problem(inner, lambda w, h: (w**2).sum()), []
        for i in (1.0, 2.0):
            w = jax.numpy.full(2, i)
            solver = bl.Unrolled(steps=3, optimizer="adam", step_size=0.1 * i, beta1=0.4 * i, eps=1e-2 * i)
            bl.hypergradient(problem, w, w + 1, inner_args=[(w,), (w + 1,)], solver=solver)
            counts.append(len(traces))
        assert counts[0] == counts[1]

    def test_python_values_that_all_batches_share_stay_python(self):
        jax = pytest.importorskip("jax")
        w = jax.numpy.ones(2)

        def inner(w, h, x, mode, power):
            assert mode == "sum"
            assert isinstance(power, int)
            return ((w - x * h) ** power).sum()

        problem = bl.Problem(inner, lambda w, h: (w**2).sum())
        args = [(w * i, "sum", 2) for i in range(3)]
        hg = bl.hypergradient(problem, w, w, inner_args=args, solver=bl.Unrolled(steps=2, step_size=0.25))
        assert hg.grad.tolist() == [0.75 * 0.5 * 2] * 2  # w_2 = ½ (½ w_0 + 0·λ) + ½ λ

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            (
                [(np.ones((8, 3)), {"y": np.ones(8)}), (np.ones((8, 3)), {"y": np.ones(7)})],
                ValueError,
                r"leaf \[1\]\['y'\] is float64 of shape \(7,\) in batch 1, but float64 of shape \(8,\) in batch 0",
            ),
            ([(np.ones(3),), (np.ones(3, int),)], ValueError, r"leaf \[0\] is int64 of shape \(3,\) in batch 1"),
            ([(np.ones(3),), (np.ones(3), 1.0)], ValueError, "batch 1 has the structure"),
            ([("a",), ("b",)], TypeError, r"leaf \[0\] of the batches is not a number or array, and it differs"),
        ],
        ids=["shape", "dtype", "structure", "words"],
    )
    def test_batches_that_are_not_alike(self, batches, error, message):
        jax = pytest.importorskip("jax")
        w = jax.numpy.ones(3)
        batches = [tuple(jax.tree.map(lambda a: a if isinstance(a, str) else jax.numpy.asarray(a), b)) for b in batches]
        problem = bl.Problem(lambda w, h, *args: ((w - h) ** 2).sum(), lambda w, h: (w**2).sum())
        with pytest.raises(error, match=message):
            bl.hypergradient(problem, w, w, inner_args=batches, solver="unrolled")


def test_batches_may_differ_in_size_in_eager_frameworks():
    for name in ("numpy", "torch"):
        backend, case = framework(name), Quartic()
        X, y, S = case.batches[2]
        case.batches[2] = (X[:5], y[:5], S)
        hg = case.hypergradient(backend, 3, step_size=0.05)
        assert relative_error(backend.to_numpy(hg.grad), case.by_hand(3, step_size=0.05)[2]) <= 1e-12


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

"""Unrolls under jit and vmap, and batches in JAX."""

import numpy as np
import pytest
from frameworks import framework, relative_error
from unrolled_cases import PROBLEM, Quartic

import bilevel as bl


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

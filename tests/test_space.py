"""The vectors of a backend: several of them together."""

import numpy as np
import pytest
from frameworks import DTYPES, tolerance


def tree_of(backend, flat):
    flat = backend.from_numpy(flat)
    return {"a": flat[:3].reshape(3, 1), "b": [flat[3:6], flat[:0]]}


@pytest.mark.parametrize("dtype", DTYPES)
class TestStacks:
    def stack(self, backend, dtype):
        space, vectors = backend.space, np.random.default_rng(0).standard_normal((3, 6)).astype(dtype)
        first = space.xp.zeros_like(space.dot(*[tree_of(backend, vectors[0])] * 2), dtype=space.xp.int32)
        stack = space.stack_like(tree_of(backend, vectors[0]), 4)
        for i, vector in enumerate(vectors):
            stack = space.put(stack, first + i, tree_of(backend, vector))
        return space, stack, np.vstack([vectors, np.zeros((1, 6), dtype)]), first

    def test_what_was_put_is_taken(self, backend, dtype):
        space, stack, vectors, first = self.stack(backend, dtype)
        for i in range(4):
            taken = space.take(stack, first + i)
            assert (backend.to_numpy(space.ravel(taken)) == vectors[i]).all()
            assert backend.to_numpy(taken["a"]).dtype == dtype

    def test_project_and_combine_are_products_with_a_matrix(self, backend, dtype):
        space, stack, vectors, _ = self.stack(backend, dtype)
        x = np.arange(6, dtype=dtype)
        dots = space.project(stack, tree_of(backend, x))
        np.testing.assert_allclose(backend.to_numpy(dots), vectors @ x, rtol=tolerance(dtype))
        sums = space.combine(dots, stack)
        assert backend.to_numpy(sums["a"]).dtype == dtype
        np.testing.assert_allclose(
            backend.to_numpy(space.ravel(sums)), vectors.T @ (vectors @ x), rtol=tolerance(dtype), atol=tolerance(dtype)
        )

    def test_map_keeps_the_dtypes_of_the_first(self, backend, dtype):
        x, y = (tree_of(backend, np.arange(1.0, 7.0).astype(d)) for d in (dtype, np.float64))
        product = backend.space.map(lambda a, b: a / b, x, y)
        assert backend.to_numpy(product["a"]).dtype == dtype
        assert (backend.to_numpy(backend.space.ravel(product)) == 1).all()


def test_a_sequence_starts_over(backend):
    items = [(backend.from_numpy(np.full(2, float(i))), {"i": backend.from_numpy(np.ones(()) * i)}) for i in range(3)]
    at = backend.space.sequence(items)
    assert [float(at(i)[1]["i"]) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert backend.to_numpy(at(4)[0]).tolist() == [1, 1]

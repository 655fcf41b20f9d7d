"""The memory of an unroll."""

import gc
import weakref

import numpy as np
import pytest
from frameworks import framework
from unrolled_cases import OPTIMIZERS, WAYS, Quartic

import bilevel as bl
from bilevel.spaces.tree import leaves_with_paths


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

"""`bl.diagnose` on functions of JAX: rules that stop derivatives, random numbers in a trace, and jit."""

import numpy as np
import pytest
from frameworks import framework
from reports import blamed, names

import bilevel as bl


class TestJax:
    """Few shapes, since each compiles."""

    @pytest.fixture(autouse=True)
    def _jax(self):
        framework("jax")

    def net(self, change):
        import jax
        import jax.numpy as jnp

        def tanh_with_a_constant_slope(x):
            @jax.custom_vjp
            def tanh(x):
                return jnp.tanh(x)

            tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(jax.lax.stop_gradient(x)) ** 2),))
            return tanh(x)

        activation = {
            "nothing": jnp.tanh,
            "stop_gradient": lambda x: jnp.tanh(x) * jax.lax.stop_gradient(jnp.tanh(x)),
            "custom_vjp": tanh_with_a_constant_slope,
            "impure": lambda x: jnp.tanh(x) * draws.random(),
        }[change]
        draws = np.random.default_rng(1)
        rng = np.random.default_rng(0)
        x, y, a, b = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((20, 3), (20,), (3, 4), (4,)))

        def outer(p, h, x, y):
            return jnp.mean((activation(x @ p["a"]) @ p["b"] - y) ** 2)

        def inner(p, h, x, y):
            return outer(p, h, x, y) + jnp.exp(h) * sum(jnp.sum(w**2) for w in p.values())

        args = {"inner_args": (x, y), "outer_args": (x + 1, y)}
        return bl.Problem(inner, outer), {"a": a, "b": b}, jnp.asarray(-3.0, jnp.float32), args

    @pytest.mark.parametrize(
        ("change", "wrong"),
        [
            ("nothing", set()),
            ("stop_gradient", {"inner grad", "inner hvp", "outer grad_params"}),
            ("custom_vjp", {"inner hvp"}),
        ],
    )
    def test_what_is_wrong_is_caught_and_what_is_right_is_not_blamed(self, change, wrong):
        """As JAX comes, without x64."""
        import jax.numpy as jnp
        from jax import enable_x64

        *case, args = self.net(change)
        with enable_x64(False):
            report = bl.diagnose(*case, solver="identity", **args)
            assert jnp.ones(2).dtype == jnp.float32
        assert blamed(report) == wrong
        assert not report.unchecked
        assert report.derivatives.eps < 1e-15  # in float64 all the same
        assert report.repeatable

    def test_a_random_number_in_a_trace_is_caught(self):
        *case, args = self.net("impure")
        report = bl.diagnose(*case, solver="identity", **args)
        assert names(report)[0] == "not repeatable"
        assert report.repetition.new_product > 0.01

    def test_within_jit_it_is_refused(self):
        import jax

        problem, params, hparams, args = self.net("nothing")
        with pytest.raises(TypeError, match="outside jit"):
            jax.jit(lambda p: bl.diagnose(problem, p, hparams, **args))(params)

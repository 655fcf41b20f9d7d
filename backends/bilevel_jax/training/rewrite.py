"""Evaluate a trace with derivatives that are finite, and that belong to the values."""

from functools import lru_cache
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from bilevel_jax.training.finite_partials import ELEMENTWISE, finite_partials

_NESTED = frozenset(("jit", "pjit", "scan", "while", "cond", "closed_call"))
_CHECKPOINT = frozenset(("checkpoint", "remat", "remat2"))


def evaluate(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    """Return the outputs of a trace. The values are the same, and the derivatives differ in two ways.

    A partial derivative that is infinite or nan counts as zero. `jax.lax.stop_gradient` is the identity. Functions with
    a `jax.custom_jvp` or `jax.custom_vjp` keep their own rule.
    """
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if hasattr(variable, "val") else values[variable]

    for equation in jaxpr.eqns:
        with equation.ctx.manager:
            out = _bind(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, out, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _bind(equation: JaxprEqn, args: list[Any]) -> Any:
    primitive, params = equation.primitive, equation.params
    name = primitive.name
    if name == "stop_gradient":
        return args
    if name in ELEMENTWISE:
        return [finite_partials(primitive, tuple(sorted(params.items())))(*args)]
    if name in _CHECKPOINT:
        function = jaxpr_as_fun(_rewritten(_closed(params["jaxpr"])))
        return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])(*args)
    if name in _NESTED:
        params = {key: _rewrite(value) for key, value in params.items()}
    bound: Any = primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a tuple up to JAX 0.9
    out = primitive.bind(*functions, *args, **params)
    return out if primitive.multiple_results else [out]


def _rewrite(param: Any) -> Any:
    """Rewrite the traces among the parameters of an equation."""
    if isinstance(param, ClosedJaxpr):
        return _rewritten(param)
    if isinstance(param, tuple) and any(isinstance(each, ClosedJaxpr) for each in param):
        return tuple(map(_rewrite, param))
    return param


@lru_cache(maxsize=256)
def _rewritten(closed: ClosedJaxpr) -> ClosedJaxpr:
    # JAX keeps one trace per jitted function. A cache here lets it also keep one compiled program.
    return jax.make_jaxpr(lambda *args: evaluate(closed, *args))(*closed.in_avals)


@lru_cache(maxsize=256)
def _closed(jaxpr: Any) -> ClosedJaxpr:
    return ClosedJaxpr(jaxpr, ())

"""The same hypergradients by other libraries for JAX, those that are installed."""

from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.speed.jax_columns import Function
from benchmarks.speed.jax_workloads import Workload


def peers(w: Workload, method: str, count: int) -> dict[str, Function]:
    """Return what computes the hypergradient of a workload, by library; those without Neumann's series are left out."""
    made: dict[str, Function] = {}
    if method == "neumann":
        return made
    with suppress(ImportError):
        import jaxopt  # noqa: F401

        made["JAXopt"] = partial(jaxopt_cg if method == "cg" else jaxopt_unrolled, w, count)
    with suppress(ImportError):
        import lineax  # noqa: F401
        import optimistix  # noqa: F401

        if method == "cg":
            made["Lineax"] = partial(lineax_cg, w, count)
            made["Optimistix"] = partial(optimistix_cg, w, count)
        else:
            made["Optimistix"] = partial(optimistix_unrolled, w, count)
    return made


def jaxopt_cg(w: Workload, count: int, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Differentiate a custom root, by CG rather than its default, CG on the normal equations."""
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    @custom_root(jax.grad(w.inner), solve=partial(solve_cg, tol=0.0, maxiter=count))
    def minimum(params: Any, log_decays: Any, train: Any) -> Any:
        return params

    return jax.grad(lambda h: w.outer(minimum(params, h, train), h, val))(log_decays)


def jaxopt_unrolled(w: Workload, count: int, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Differentiate through its gradient descent."""
    from jaxopt import GradientDescent

    descent = GradientDescent(
        w.inner, stepsize=w.step_size, maxiter=count, tol=0.0, acceleration=False, implicit_diff=False, unroll=True
    )
    return jax.grad(lambda h: w.outer(descent.run(params, h, train).params, h, val))(log_decays)


def lineax_cg(w: Workload, count: int, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Solve with its CG, every tenth residual of which is computed anew by a product more."""
    import lineax as lx

    rhs = jax.grad(w.outer)(params, log_decays, val)
    operator = lx.JacobianLinearOperator(
        lambda p, _: jax.grad(w.inner)(p, log_decays, train), params, tags=lx.positive_semidefinite_tag
    )
    v = lx.linear_solve(operator, rhs, lx.CG(rtol=0.0, atol=0.0, max_steps=count)).value
    _, pull = jax.vjp(lambda h: jax.grad(w.inner)(params, h, train), log_decays)
    return jax.tree.map(jnp.negative, pull(v)[0])


def optimistix_cg(w: Workload, count: int, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Differentiate a minimum implicitly, with Lineax's CG."""
    import lineax as lx
    import optimistix as optx

    def minimum(h: Any) -> Any:
        adjoint = optx.ImplicitAdjoint(lx.CG(rtol=0.0, atol=0.0, max_steps=count))
        return optx.minimise(
            lambda p, args: w.inner(p, *args), optx.GradientDescent(w.step_size, rtol=jnp.inf, atol=jnp.inf), params,
            (h, train), max_steps=1, throw=False, adjoint=adjoint, tags=frozenset([lx.positive_semidefinite_tag]),
        ).value  # fmt: skip

    return jax.grad(lambda h: w.outer(minimum(h), h, val))(log_decays)


def optimistix_unrolled(w: Workload, count: int, params: Any, log_decays: Any, train: Any, val: Any) -> Any:
    """Differentiate through its gradient descent, with its checkpoints; its first step only evaluates."""
    import optimistix as optx

    def end(h: Any) -> Any:
        return optx.minimise(
            lambda p, args: w.inner(p, *args), optx.GradientDescent(w.step_size, rtol=0.0, atol=0.0), params,
            (h, train), max_steps=count + 1, throw=False, adjoint=optx.RecursiveCheckpointAdjoint(),
        ).value  # fmt: skip

    return jax.grad(lambda h: w.outer(end(h), h, val))(log_decays)

"""A callback for failed solves only. A callback for each solve would take longer than a small solve."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from bilevel.results import SolverInfo

Tell = Callable[[SolverInfo, list[Any]], None]
Failed = Callable[[Any], Any]  # from a status to a flag


def tell_failure(tell: Tell, failed: Failed, info: SolverInfo, options: Sequence[object]) -> None:
    """Call tell(info, options) on the host if a solve with these options failed.

    In eager code, its errors are raised as they are. In compiled code, only the branch of a failure has the callback.
    For a batch of solves, only the worst one is told.
    """
    _tell_failure.bind(*map(jnp.asarray, (*info, *options)), tell=tell, failed=failed)


def _eager(*arrays: jax.Array, tell: Tell, failed: Failed) -> list[object]:
    info, options = _split(arrays)
    if failed(info.status):
        tell(info, options)
    return []


def _compiled(*arrays: jax.Array, tell: Tell, failed: Failed) -> list[object]:
    info, options = _split(arrays)
    lax.cond(failed(info.status), lambda: jax.debug.callback(tell, info, options), lambda: None)
    return []


def _split(arrays: Sequence[jax.Array]) -> tuple[SolverInfo, list[jax.Array]]:
    count = len(SolverInfo._fields)
    return SolverInfo(*arrays[:count]), list(arrays[count:])


def _effects(*_: object, **__: object) -> tuple[list[object], Any]:
    return [], _of_a_callback()


@cache
def _of_a_callback() -> Any:
    return jax.make_jaxpr(lambda: jax.debug.callback(print))().effects


def _worst(arrays: Sequence[jax.Array], axes: Sequence[Any], **options: Any) -> tuple[list[object], list[object]]:
    """Select the solve with the largest status. If each solve had its own flag, JAX would run both branches."""
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    pairs = zip(arrays, axes, strict=True)
    batches = [jnp.broadcast_to(x, (size,)) if a is None else jnp.moveaxis(x, a, 0) for x, a in pairs]
    worst = jnp.argmax(_split(batches)[0].status)
    return _tell_failure.bind(*(x[worst] for x in batches), **options), []


_tell_failure = Primitive("tell_failure")
_tell_failure.multiple_results = True
_tell_failure.def_impl(_eager)
_tell_failure.def_effectful_abstract_eval(_effects)
batching.primitive_batchers[_tell_failure] = _worst
mlir.register_lowering(_tell_failure, mlir.lower_fun(_compiled, multiple_results=True))

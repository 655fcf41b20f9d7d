"""A callback for failed solves and kinks only. A callback for each solve would take longer than a small solve."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from bilevel.results import SolverInfo
from bilevel.spaces.array import V

Tell = Callable[[SolverInfo, list[Any]], None]
Failed = Callable[[Any], Any]  # from a status to a flag


def tell_failure(tell: Tell, failed: Failed, info: SolverInfo, options: Sequence[object], v: V) -> V:
    """Return v, and call tell(info, options) on the host if the solve for v with these options failed, or is at a kink.

    In eager code, its errors are raised as they are. In compiled code, only the branch of a failure has the callback.
    For a batch of solves, only the worst one is told.
    """
    [zero] = _tell_failure.bind(*map(jnp.asarray, (*info, *options)), tell=tell, failed=failed)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), v)


def _eager(*arrays: jax.Array, tell: Tell, failed: Failed) -> list[jax.Array]:
    info, options = _split(arrays)
    if failed(info.status) or info.kinks > 0:
        tell(info, options)
    return [jnp.zeros((), jnp.float32)]


def _compiled(*arrays: jax.Array, tell: Tell, failed: Failed) -> list[jax.Array]:
    """Return the result of the callback, 0, as a part of v.

    Without a result, the callback would be a side effect. JAX calls functions with side effects from Python. This takes
    a tenth of a millisecond for each call.
    """
    info, options = _split(arrays)

    def host(*arrays: jax.Array) -> np.ndarray:
        tell(*_split([np.asarray(x) for x in arrays]))
        return np.zeros((), np.float32)

    zero = jax.ShapeDtypeStruct((), jnp.float32)
    failure = lambda: jax.pure_callback(host, zero, *info, *options, vmap_method="sequential")  # noqa: E731
    return [lax.cond(failed(info.status) | (info.kinks > 0), failure, lambda: jnp.zeros((), jnp.float32))]


def _split(arrays: Sequence[Any]) -> tuple[SolverInfo, list[Any]]:
    count = len(SolverInfo._fields)
    return SolverInfo(*arrays[:count]), list(arrays[count:])


def _worst(arrays: Sequence[jax.Array], axes: Sequence[Any], **options: Any) -> tuple[list[jax.Array], list[object]]:
    """Select the solve with the largest status. If each solve had its own flag, JAX would run both branches."""
    size = next(x.shape[a] for x, a in zip(arrays, axes, strict=True) if a is not None)
    pairs = zip(arrays, axes, strict=True)
    batches = [jnp.broadcast_to(x, (size,)) if a is None else jnp.moveaxis(x, a, 0) for x, a in pairs]
    infos = _split(batches)[0]
    worst = jnp.argmax(infos.status + 0.5 * (infos.kinks > 0))
    return _tell_failure.bind(*(x[worst] for x in batches), **options), [None]


_tell_failure = Primitive("tell_failure")
_tell_failure.multiple_results = True
_tell_failure.def_impl(_eager)
_tell_failure.def_abstract_eval(lambda *_, **__: [ShapedArray((), jnp.float32)])
batching.primitive_batchers[_tell_failure] = _worst
mlir.register_lowering(_tell_failure, mlir.lower_fun(_compiled, multiple_results=True))

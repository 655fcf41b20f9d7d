"""Training steps in JAX: blocks of steps, each compiled as one loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import Partial
from typing_extensions import override

from bilevel.backend import Backend
from bilevel.dependence import warn_of_cut
from bilevel.steps import Pull, Pulled, Steps, add, floats_of, with_floats
from bilevel.validation import check_dtypes, check_like
from bilevel_jax.dependence import dependence, trace
from bilevel_jax.partition import Divided, combine, partition
from bilevel_jax.space import JaxSpace

COMPILED = 128


@dataclass(frozen=True)
class JaxSteps(Steps):
    """Steps that are compiled in blocks."""

    backend: Backend
    step: Callable[..., Any]

    def __post_init__(self) -> None:
        try:
            hash(self.step)
        except TypeError:
            raise TypeError(
                f"step: a {type(self.step).__name__} has no hash, so its compiled code cannot be found again. Make it "
                "a function or a frozen dataclass."
            ) from None

    @override
    def start(self, state: Any) -> Any:
        return jax.tree.map(_as_array, state)

    @override
    def advance(self, state: Any, hparams: Any, batches: Sequence[Any]) -> Any:
        for block in _blocks(batches):
            state = _with_arrays(state, self._run(_advance, state, hparams, *block))
        return state

    @override
    def record(self, state: Any, hparams: Any, batches: Sequence[Any]) -> tuple[Any, Pull]:
        pulls: list[Callable[..., Any]] = []
        for block in _blocks(batches):
            arrays, pull = self._run(_record, state, hparams, *block)
            state = _with_arrays(state, arrays)
            pulls.append(pull)

        def pull_all(cotangent: list[Any], many: bool) -> Pulled:
            return _through([partial(_call, pull, many) for pull in pulls], cotangent)

        return state, pull_all

    @override
    def pull_back(self, state: Any, hparams: Any, batches: Sequence[Any], cotangent: list[Any], many: bool) -> Pulled:
        pulls: list[Callable[..., Any]] = []
        for block in (blocks := list(_blocks(batches))):
            pulls.append(partial(self._run, _pull_back, state, hparams, *block, many))
            if block is not blocks[-1]:
                state = _with_arrays(state, self._run(_advance, state, hparams, *block))
        return _through(pulls, cotangent)

    @override
    def graph_bytes(self, state: Any, hparams: Any, batch: Any) -> int:
        arrays: list[object] = []
        static = partition((state, hparams, jax.tree.map(_as_array, batch), 1, True), arrays)

        def pull(arrays: list[object]) -> Any:
            return _record(self, *combine(static, iter(arrays)))[1]

        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(pull, arrays)))

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        arrays: list[object] = []
        static = partition(args, arrays)
        found = _compiled(function, self, static)(arrays)
        _check_outside(found)  # an argument, or a value that the step closes over, may be traced
        return found

    def next(self, state: Any, hparams: Any, batch: Any) -> Any:
        """Return the next state. Raise unless it has the structure, shapes and dtypes of the state."""
        after = self.step(state, hparams, batch)
        structures = jax.tree.structure(after), jax.tree.structure(state)
        if structures[0] != structures[1] or _kinds(after) != _kinds(state):
            arrays = [jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else None, t) for t in (after, state)]
            check_like(self.backend, "step", arrays[0], "state", arrays[1])
            try:
                check_dtypes(self.backend, "step", arrays[0], "state", arrays[1])
            except TypeError as error:
                number = jnp.result_type(float)
                raise TypeError(f"{error} A number of Python in a batch becomes an array of {number}.") from None
            others = [[x for x in jax.tree.leaves(t) if not hasattr(x, "dtype")] for t in (state, after)]
            raise ValueError(
                f"step: expected a state of the structure {structures[1]} with the constants {others[0]}, got "
                f"{structures[0]} with {others[1]}. Only arrays may change."
            )
        for (path, old), new in zip(self.backend.leaves(state), jax.tree.leaves(after), strict=True):
            if old is not new and hasattr(old, "dtype") and jnp.issubdtype(old.dtype, jnp.complexfloating):
                raise TypeError(
                    f"state{path}: derivatives do not flow through complex arrays. Store its real and imaginary parts, "
                    "and join them inside the step."
                )
        return after


Block = tuple[Any, int, bool]
"""The batches of a compiled loop, stacked, or with the flag one batch for all steps; and the number of steps."""


def _blocks(batches: Sequence[Any]) -> Iterator[Block]:
    """Yield consecutive batches of equal structure, shapes and dtypes together."""
    if all(batch is batches[0] for batch in batches):
        yield jax.tree.map(_as_array, batches[0]), len(batches), True
        return
    flat = [jax.tree.flatten(batch) for batch in batches]
    for (structure, _), group in groupby(flat, lambda batch: (batch[1], [*map(_kind, batch[0])])):
        rows = [leaves for leaves, _ in group]
        yield jax.tree.unflatten(structure, [*map(_stack, zip(*rows, strict=True))]), len(rows), False


def _kind(leaf: Any) -> Any:
    """Return shape and dtype of an array, the class of a number, or any other leaf itself."""
    if hasattr(leaf, "dtype"):
        return leaf.shape, leaf.dtype
    return type(leaf) if isinstance(leaf, bool | int | float) else leaf


def _stack(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], jax.Array):
        return jnp.stack(parts)
    return np.array(parts) if isinstance(parts[0], _NUMBERS) else parts[0]


_NUMBERS = (bool, int, float, np.ndarray, np.generic, jax.Array)


def _as_array(leaf: Any) -> Any:
    """Return a number or array as a JAX array without a weak type. Return any other leaf unchanged."""
    _check_outside(leaf)
    if not isinstance(leaf, _NUMBERS) or (isinstance(leaf, jax.Array) and (_is_key(leaf) or not leaf.weak_type)):
        return leaf
    return lax.convert_element_type(jnp.asarray(leaf), jnp.result_type(leaf))


def _check_outside(tree: Any) -> None:
    """Raise a TypeError for an array that JAX is tracing."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "bl.metagradient stores states outside of compiled code, so it cannot be called under jit, grad or vmap. "
            'Call it outside, or use bl.hypergradient with solver="unrolled".'
        )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _kinds(tree: Any) -> list[Any]:
    return [_kind(leaf) for leaf in jax.tree.leaves(tree)]


def _arrays(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]


def _with_arrays(tree: Any, arrays: Sequence[jax.Array]) -> Any:
    supply = iter(arrays)
    return jax.tree.map(lambda leaf: next(supply) if isinstance(leaf, jax.Array) else leaf, tree)


def _through(pulls: Sequence[Callable[[list[Any]], Any]], cotangent: list[Any]) -> Pulled:
    """Pull a cotangent back through blocks, from the last to the first. Add the cotangents of hparams."""
    total: list[Any] = []
    for pull in reversed(pulls):
        cotangent, cross = pull(cotangent)
        total = add(total, cross)
    return Pulled(cotangent, total)


def _advance(steps: JaxSteps, state: Any, hparams: Any, data: Any, count: int, shared: bool) -> list[jax.Array]:
    """Return the arrays of the state after some steps."""

    def body(arrays: list[jax.Array], batch: Any) -> tuple[list[jax.Array], None]:
        return _arrays(steps.next(_with_arrays(state, arrays), hparams, _with_arrays(data, batch))), None

    # A block stores one state per step. Without this, the values inside of all its steps take more time to write.
    body = jax.checkpoint(body, prevent_cse=False)
    if shared:
        return JaxSpace(None).scan(lambda arrays, _: body(arrays, _arrays(data)), _arrays(state), None, count)[0]
    return JaxSpace(None).scan(body, _arrays(state), _arrays(data), count)[0]


def _record(
    steps: JaxSteps, state: Any, hparams: Any, data: Any, count: int, shared: bool
) -> tuple[list[jax.Array], Callable[[list[Any]], Any]]:
    backend = steps.backend

    def run(floats: list[jax.Array], hparams: Any) -> tuple[list[jax.Array], list[jax.Array]]:
        arrays = _advance(steps, with_floats(backend, state, floats), hparams, data, count, shared)
        return floats_of(backend, arrays), arrays

    def one(floats: list[jax.Array], hparams: Any) -> list[jax.Array]:
        batch = data if shared else jax.tree.map(lambda a: a[0] if hasattr(a, "shape") else a, data)
        return floats_of(backend, steps.next(with_floats(backend, state, floats), hparams, batch))

    floats = floats_of(backend, state)
    used = dependence(trace(one, floats, hparams), floats)
    if not any(used.params):
        warn_of_cut()
    _, pull, arrays = jax.vjp(run, floats, hparams, has_aux=True)
    return arrays, Partial(partial(_of_used, tuple(used.hparams)), pull)


def _of_used(used: tuple[bool, ...], pull: Callable[[list[Any]], Any], cotangent: list[Any]) -> Any:
    state, hparams = pull(cotangent)
    return state, [leaf if flag else None for leaf, flag in zip(jax.tree.leaves(hparams), used, strict=True)]


def _pull_back(
    steps: JaxSteps, state: Any, hparams: Any, data: Any, count: int, shared: bool, many: bool, cotangent: list[Any]
) -> Any:
    pull = _record(steps, state, hparams, data, count, shared)[1]
    return (jax.vmap(pull) if many else pull)(cotangent)


@partial(jax.jit, static_argnums=1)
def _call(pull: Callable[[list[Any]], Any], many: bool, cotangent: list[Any]) -> Any:
    return (jax.vmap(pull) if many else pull)(cotangent)


@lru_cache(maxsize=COMPILED)
def _compiled(function: Callable[..., Any], steps: JaxSteps, static: Divided) -> Callable[[list[object]], Any]:
    @jax.jit
    def call(arrays: list[object]) -> Any:
        return function(steps, *combine(static, iter(arrays)))

    return call

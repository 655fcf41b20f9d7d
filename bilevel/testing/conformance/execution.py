"""The laws of a solver's execution by a framework: late flags, host synchronisations, `jit` and `vmap`."""

import sys
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np

from bilevel.backend import Backend
from bilevel.spaces.array import Array
from bilevel.spaces.space import Space
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.judge import expect, relative_error, same
from bilevel.testing.conformance.subject import Kind, Subject, run

READS = 12  # reads by the host in a solve, in addition to one per 8 steps: rounds, branches, the last flag


class _Overrun:
    """A vector space whose loops take ``extra`` steps after their flag is false, like loops that read it late."""

    def __init__(self, space: Space[Any], extra: int) -> None:
        self._space, self._extra = space, extra

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    def while_loop(self, live: Callable[[Any], Array], body: Callable[[Any], Any], state: Any, max_steps: int) -> Any:
        """Repeat body while live(state), and up to ``extra`` times more."""

        def on(carry: tuple[Any, Array]) -> Array:
            return live(carry[0]) | (carry[1] < self._extra)

        def step(carry: tuple[Any, Array]) -> tuple[Any, Array]:
            return body(carry[0]), carry[1] + self.xp.where(live(carry[0]), 0, 1)

        none = self.xp.where(live(state), 0, 0)
        return self._space.while_loop(on, step, (state, none), max_steps)[0]


def late_backends(backend: Backend) -> list[tuple[Backend, list[Backend]]]:
    """Return backends whose loops stop at once, each with copies that must give the same bits.

    Loops of the copies read their flag late, or take extra steps after it is false.
    """

    def overrunning(extra: int) -> Backend:
        other = copy(backend)
        other.space = lambda tree: _Overrun(backend.space(tree), extra)  # pyright: ignore
        return other

    pairs = [(backend, [overrunning(1), overrunning(7)])]
    if reading := rarely_reading(backend):  # their scalars are of another type, and may be rounded differently
        pairs.append((reading[0], reading[1:]))
    return pairs


def rarely_reading(backend: Backend) -> list[Backend]:
    """Return copies of the torch backend that read a loop's flag every 1, 2, 7 and 1000 steps, as on an accelerator.

    For other backends, the list is empty.
    """
    others = [copy(backend) for _ in range(4)] if backend.name == "torch" else []
    for other, every in zip(others, (1, 2, 7, 1000), strict=False):
        other.check_every = every  # pyright: ignore[reportAttributeAccessIssue]
    return others


def overrun(s: Subject) -> None:
    """Steps that a loop takes after its flag is false change no bit of the result."""
    for system in (systems.definite(), systems.clustered(), systems.indefinite(), systems.singular()):
        for backend, copies in late_backends(s.backend):
            plain = s.solve(system, backend=backend)
            for other in copies:
                late = s.solve(system, backend=other)
                expect(same(late, plain), s, system, f"the bits of a loop that stops at once ({plain})", late)


def host_reads(s: Subject) -> None:
    """A solve does not wait for the device at each step: the host reads only a loop's flag, every few steps."""
    torch = sys.modules["torch"]

    class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    system = systems.long()
    arrays = (s.array(system.matrix), s.array(0 * system.rhs))
    with CountReads() as count:
        x, info = run(rarely_reading(s.backend)[-1], s.solver, Kind(), arrays, s.array(system.rhs), None)
    answer = s.answer(x, info)
    allowed = READS + answer.info.steps // 8
    expect(count.reads <= allowed, s, system, f"at most {allowed} reads by the host", f"{count.reads}; {answer}")


def under_jit_and_vmap(s: Subject) -> None:
    """A batch under the caller's `jax.jit` and `jax.vmap` gives the same results as each system alone."""
    jax, batch = sys.modules["jax"], [systems.definite(), systems.multiple(2.0), systems.ill_conditioned()]
    xp = s.backend.space(s.array(1.0)).xp

    def solve(matrix: Array, rhs: Array) -> Any:
        return run(s.backend, s.solver, Kind(), (matrix, xp.zeros_like(rhs)), rhs, None)

    shift = s.damping * np.eye(systems.SIZE)
    arrays = [[s.array(system.matrix - shift), s.array(system.rhs)] for system in batch]
    xs, infos = jax.jit(jax.vmap(solve))(*(xp.stack(parts) for parts in zip(*arrays, strict=True)))
    for i, system in enumerate(batch):
        alone, answer = s.solve(system), s.answer(xs[i], [entry[i] for entry in infos])
        close = relative_error(answer.x, alone.x) <= s.tolerance() * system.condition
        expect(
            close and answer.info.status == alone.info.status, s, system, f"the result without vmap ({alone})", answer
        )


def laws_on(backend: Backend) -> list[Law]:
    """Return the laws that apply to a backend."""
    if backend.name == "jax":  # its loops never take extra steps
        return [under_jit_and_vmap]
    return [overrun, host_reads] if rarely_reading(backend) else [overrun]


ALL: list[Law] = [overrun, host_reads, under_jit_and_vmap]

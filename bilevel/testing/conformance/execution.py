"""Laws that concern how a framework runs a solver: flags read late, host synchronisations, `jit` and `vmap`."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.protocols import Backend, Point
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law
from bilevel.testing.conformance.judge import expect, relative_error, same
from bilevel.testing.conformance.subject import Subject, run, with_space

READS = 12  # that a solve may take beside its steps: rounds, branches, the last flag


class Overrun:
    """A vector space whose loops run some steps beyond the fall of their flag, as where it is read late."""

    def __init__(self, space: Any, extra: int) -> None:
        self._space, self._extra = space, extra

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    def while_loop(self, live: Callable, body: Callable, state: Any, max_steps: int) -> Any:
        """Repeat body while live(state), and up to ``extra`` times more."""

        def on(carry: Any) -> Any:
            return live(carry[0]) | (carry[1] < self._extra)

        def step(carry: Any) -> Any:
            return body(carry[0]), carry[1] + self.xp.where(live(carry[0]), 0, 1)

        none = self.xp.where(live(state), 0, 0)
        return self._space.while_loop(on, step, (state, none), max_steps)[0]


def overrun(s: Subject) -> None:
    """Steps that a loop takes after its flag has fallen change no bit: a body whose solve has stopped does nothing."""
    spaces = [*(Overrun(s.backend.space, extra) for extra in (1, 7)), *late_spaces(s.backend)]
    for system in (systems.definite(), systems.clustered(), systems.indefinite(), systems.singular()):
        plain = s.solve(system)
        for space in spaces:
            late = s.solve(system, space=space)
            expect(same(late, plain), s, system, f"the bits of a loop that stops at once ({plain})", late)


def host_reads(s: Subject) -> None:
    """A solve does not wait for the device at each step: the host reads no value but a loop's flag, when it is due."""
    torch = sys.modules["torch"]

    class CountReads(torch.utils._python_dispatch.TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.reads += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    system = systems.long()
    backend = with_space(s.backend, late_spaces(s.backend)[-1])
    point = Point([s.array(system.matrix), s.array(0 * system.rhs)], s.array(system.rhs))  # pyright: ignore
    with CountReads() as count:
        x, info = run(backend, s.solver, None, point)
    answer = s.answer(x, info)
    allowed = READS + answer.info.steps // 8
    expect(count.reads <= allowed, s, system, f"at most {allowed} reads by the host", f"{count.reads}; {answer}")


def under_jit_and_vmap(s: Subject) -> None:
    """A batch under the caller's own `jax.jit` and `jax.vmap` gives what each system gives alone."""
    jax, batch = sys.modules["jax"], [systems.definite(), systems.multiple(2.0), systems.ill_conditioned()]
    space = s.backend.space

    def solve(matrix: Any, rhs: Any) -> Any:
        return run(s.backend, s.solver, None, Point([matrix, space.zeros_like(rhs)], rhs))  # pyright: ignore

    shift = s.damping * np.eye(systems.SIZE)
    arrays = [[s.array(system.matrix - shift), s.array(system.rhs)] for system in batch]
    xs, infos = jax.jit(jax.vmap(solve))(*(space.xp.stack(parts) for parts in zip(*arrays, strict=True)))
    for i, system in enumerate(batch):
        alone, answer = s.solve(system), s.answer(xs[i], [entry[i] for entry in infos])
        close = relative_error(answer.x, alone.x) <= s.tolerance() * system.condition
        expect(close and answer.info.status == alone.info.status, s, system, f"what it gives alone ({alone})", answer)


def laws_on(backend: Backend) -> list[Law]:
    """Return the laws that apply to a backend."""
    if backend.name == "jax":  # which never takes a step too many
        return [under_jit_and_vmap]
    return [overrun, host_reads] if late_spaces(backend) else [overrun]


ALL: list[Law] = [overrun, host_reads, under_jit_and_vmap]


def late_spaces(backend: Backend) -> list[Any]:
    """Return vector spaces that read a loop's flag every 2, 7 and 1000 steps; of torch, which can."""
    if backend.name != "torch" or not hasattr(backend.space, "check_every"):
        return []
    return [dataclasses.replace(backend.space, check_every=k) for k in (2, 7, 1000)]  # pyright: ignore

"""Laws that concern how a framework runs a solver: flags read late, host synchronisations, `jit` and `vmap`."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from bilevel.protocols import Backend, Point
from bilevel.testing.conformance import systems
from bilevel.testing.conformance.checks import Law, require
from bilevel.testing.conformance.judge import relative_error, same
from bilevel.testing.conformance.subject import Answer, Subject, operator_of, run, with_space
from bilevel.testing.conformance.systems import System

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
    for system in (systems.definite(), systems.indefinite(), systems.singular(), systems.multiple(2.0)):
        plain = s.solve(system)
        for space in spaces:
            late = s.solve(system, space=space)
            _require(same(late, plain), s, system, f"the bits of a loop that stops at once ({plain})", late)


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
    allowed = READS + answer.info.steps // 4
    _require(count.reads <= allowed, s, system, f"at most {allowed} reads by the host", f"{count.reads}; {answer}")


def under_jit(s: Subject) -> None:
    """Inside the caller's own `jax.jit` a solve gives what it gives outside."""
    jax, system = sys.modules["jax"], systems.definite()
    solve = jax.jit(lambda matrix, rhs: _solve(s, matrix, rhs))
    answer = s.answer(*solve(*_arrays(s, system)))
    _same_to_rounding(s, system, answer)


def under_vmap(s: Subject) -> None:
    """A batch of systems under `jax.vmap` gives what each gives alone, though they stop at different steps."""
    jax, batch = sys.modules["jax"], [systems.definite(), systems.multiple(2.0), systems.ill_conditioned()]
    arrays = [s.backend.space.xp.stack(parts) for parts in zip(*(_arrays(s, system) for system in batch), strict=True)]
    xs, infos = jax.jit(jax.vmap(lambda matrix, rhs: _solve(s, matrix, rhs)))(*arrays)
    for i, system in enumerate(batch):
        _same_to_rounding(s, system, s.answer(xs[i], [entry[i] for entry in infos]))


def laws_on(backend: Backend) -> list[Law]:
    """Return the laws that apply to a backend."""
    if backend.name == "jax":  # which never takes a step too many
        return [under_jit, under_vmap]
    return [overrun, host_reads] if late_spaces(backend) else [overrun]


ALL: list[Law] = [overrun, host_reads, under_jit, under_vmap]


def late_spaces(backend: Backend) -> list[Any]:
    """Return vector spaces that read a loop's flag every 2, 7 and 1000 steps; of torch, which can."""
    if backend.name != "torch":
        return []
    return [dataclasses.replace(backend.space, check_every=k) for k in (2, 7, 1000)]  # pyright: ignore


def _arrays(s: Subject, system: System) -> list[Any]:
    return [s.array(system.matrix - s.damping * np.eye(system.rhs.size)), s.array(system.rhs)]


def _solve(s: Subject, matrix: Any, rhs: Any) -> Any:
    space = s.backend.space
    return s.solver.solve(operator_of(s.solver, matrix, space.zeros_like(rhs), rhs, space), rhs, None, space)


def _same_to_rounding(s: Subject, system: System, answer: Answer) -> None:
    alone = s.solve(system)
    close = relative_error(answer.x, alone.x) <= s.tolerance() * system.condition
    _require(close and answer.info.status == alone.info.status, s, system, f"what it gives alone ({alone})", answer)


def _require(holds: object, s: Subject, system: System, expected: str, got: object) -> None:
    require(holds, f"{system.what}, by {s}", expected, got)

"""Objectives evaluated without a trace: random states, buffers and parameters of modules are put back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from bilevel.linearization import Inputs
from bilevel.spaces.array import H, P
from bilevel.spaces.tree import tree_map


@contextmanager
def isolated(inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
    """See `bilevel.backend.Backend.isolated`.

    A loss that runs a module uses the module's own tensors, and not its arguments. So while this lasts, a hook gives
    every module that is called other tensors to hold: the moved one in place of a parameter, a copy in place of a
    buffer. The user's own tensors are never written to. A parameter whose dtype has changed once, for example, has lost
    the hooks that DDP put on it.
    """
    stand_ins, states = _StandIns(double), _random_states()

    def at(params: P, hparams: H) -> Inputs[P, H]:
        _restore(states)
        stand_ins.give_back()
        return Inputs(
            params=tree_map(stand_ins.move, inputs.params, params),
            hparams=tree_map(stand_ins.move, inputs.hparams, hparams),
            inner_args=tree_map(stand_ins.convert, inputs.inner_args),
            outer_args=tree_map(stand_ins.convert, inputs.outer_args),
        )

    hook = register_module_forward_pre_hook(stand_ins.enter)
    try:
        yield at
    finally:
        hook.remove()
        stand_ins.give_back()
        _restore(states)


@contextmanager
def buffers_isolated() -> Iterator[None]:
    """Let a module that a checkpoint runs again move copies of its buffers."""
    stand_ins = _StandIns(double=False)

    def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: what other threads train is their own affair
            stand_ins.hold(module)

    hook = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        hook.remove()
        stand_ins.give_back()


class _StandIns:
    """What modules hold instead of their own tensors, each from its first call until `give_back`."""

    def __init__(self, double: bool) -> None:
        self.double = double
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id, also that of the stand-in itself
        self.held: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []

    def convert(self, leaf: Any) -> Any:
        """Return a tensor in the dtype to compute in, and anything else as it is."""
        if self.double and isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        return leaf

    def move(self, own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a value as a variable that stands for the user's own tensor."""
        return self._remember(own, torch.nn.Parameter(self.convert(value.detach()).clone()))

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        """Stand in for the tensors of a module that is about to run, and convert what it is about to see."""
        self.hold(module)
        return tree_map(self.convert, args)

    def hold(self, module: torch.nn.Module) -> None:
        """Stand in for the tensors of a module and of those in it.

        Not all of these are called: attention reads the weights of its projections.
        """
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):  # does not let go of its tensors
                continue
            for name, own in [*part.named_parameters(recurse=False, remove_duplicate=False)]:
                self._hold(part, name, own, self._parameter(own))
            for name, own in [*part.named_buffers(recurse=False, remove_duplicate=False)]:
                self._hold(part, name, own, self._buffer(own))

    def _hold(self, module: torch.nn.Module, name: str, own: torch.Tensor, stand_in: torch.Tensor) -> None:
        if stand_in is not own:
            setattr(module, name, stand_in)
            self.held.append((module, name, own, stand_in))

    def give_back(self) -> None:
        """Give the modules their own tensors back, unless someone else has already."""
        while self.held:
            module, name, own, stand_in = self.held.pop()
            if getattr(module, name) is stand_in:
                setattr(module, name, own)
        self.known.clear()

    def _parameter(self, own: torch.Tensor) -> torch.Tensor:
        if id(own) in self.known:
            return self.known[id(own)][1]
        converted = self.convert(own.detach())
        # What is part of the graph was handed over by functional_call.
        if converted.dtype == own.dtype or not own.is_leaf:
            return own
        return self._remember(own, torch.nn.Parameter(converted, requires_grad=own.requires_grad))

    def _buffer(self, own: torch.Tensor) -> torch.Tensor:
        if id(own) in self.known:
            return self.known[id(own)][1]
        return own if own.requires_grad else self._remember(own, self.convert(own).clone())

    def _remember(self, own: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
        self.known[id(own)] = (own, stand_in)
        self.known[id(stand_in)] = (stand_in, stand_in)
        return stand_in


def _random_states() -> list[tuple[Callable[[Any], None], Any]]:
    states: list[tuple[Callable[[Any], None], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


def _restore(states: list[tuple[Callable[[Any], None], Any]]) -> None:
    for restore, state in states:
        restore(state)

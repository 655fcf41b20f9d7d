"""Evaluate objectives without side effects: random states and the tensors of modules are restored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from bilevel.linearization import Inputs
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.tree import tree_map


@contextmanager
def isolated(inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
    """See `bilevel.backend.Backend.isolated`.

    A loss that runs a module uses the module's tensors, not its arguments. So in this block, a hook replaces the
    tensors of every called module: a parameter by the moved parameter, a buffer by a copy. The user's tensors are never
    written to. For example, a parameter whose dtype changes once loses the hooks of DDP.
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
    """Replace the buffers of modules by copies while a checkpoint runs the modules again."""
    stand_ins = _StandIns(double=False)

    def enter(module: torch.nn.Module, args: Args) -> None:
        if torch._C._current_graph_task_id() != -1:  # only in a backward pass: other threads may be training
            stand_ins.hold(module)

    hook = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        hook.remove()
        stand_ins.give_back()


class _StandIns:
    """Replacements for the tensors of modules, each in place from the module's first call until `give_back`."""

    def __init__(self, double: bool) -> None:
        self.double = double
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the id of the original and of the stand-in
        self.held: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []

    def convert(self, leaf: object) -> Any:
        """Return a floating-point tensor in the dtype of the computation. Return any other value unchanged."""
        if self.double and isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        return leaf

    def move(self, own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a value as a variable that replaces the user's tensor."""
        return self._remember(own, torch.nn.Parameter(self.convert(value.detach()).clone()))

    def enter(self, module: torch.nn.Module, args: Args) -> Any:
        """Replace the tensors of a module before it runs, and convert its arguments."""
        self.hold(module)
        return tree_map(self.convert, args)

    def hold(self, module: torch.nn.Module) -> None:
        """Replace the tensors of a module and of its submodules.

        Not all submodules are called: attention reads the weights of its projections.
        """
        for part in module.modules():
            if isinstance(part, torch.jit.ScriptModule):  # its tensors cannot be replaced
                continue
            parameters = [*part.named_parameters(recurse=False, remove_duplicate=False)]
            buffers = [*part.named_buffers(recurse=False, remove_duplicate=False)]
            pairs = [(name, own, self._parameter(own)) for name, own in parameters]
            for name, own, stand_in in pairs + [(name, own, self._buffer(own)) for name, own in buffers]:
                if stand_in is not own:
                    setattr(part, name, stand_in)
                    self.held.append((part, name, own, stand_in))

    def give_back(self) -> None:
        """Restore the tensors of the modules, except where other code has replaced them since."""
        while self.held:
            module, name, own, stand_in = self.held.pop()
            if getattr(module, name) is stand_in:
                setattr(module, name, own)
        self.known.clear()

    def _parameter(self, own: torch.Tensor) -> torch.Tensor:
        if id(own) in self.known:
            return self.known[id(own)][1]
        converted = self.convert(own.detach())
        # A tensor inside a graph comes from functional_call.
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

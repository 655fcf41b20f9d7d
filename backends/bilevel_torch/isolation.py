"""Evaluate objectives without side effects: random states, inputs and the tensors of modules are restored."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from typing_extensions import TypeIs, override

from bilevel.linearization import Inputs
from bilevel.spaces.array import Args, H, P
from bilevel.spaces.tree import leaves, tree_map


@contextmanager
def isolated(inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
    """Yield ``at(params, hparams)``, which returns the inputs with other values, as in `Backend.isolated`.

    A loss may use the user's tensors, not its arguments, for example if it runs a module. So these tensors must have
    the other values too:

    - The params and hparams that are leaves and require gradients: ``at`` exchanges their contents for moved copies.
    - The other tensors of a module that is called: a hook replaces a parameter by a converted copy, a buffer by a copy.

    At the end, and before ``at`` runs again, the exchanges and replacements are undone. The user's memory is never
    written to, and gradient hooks stay. An assignment to ``.data`` is no alternative: if it changes the dtype, DDP's
    hooks are lost.
    """
    stand_ins, states = _StandIns(double), random_states()

    def at(params: P, hparams: H) -> Inputs[P, H]:
        set_random_states(states)
        stand_ins.give_back()
        return Inputs(
            params=tree_map(stand_ins.move, inputs.params, params),
            hparams=tree_map(stand_ins.move, inputs.hparams, hparams),
            inner_args=tree_map(stand_ins.convert, inputs.inner_args),
            outer_args=tree_map(stand_ins.convert, inputs.outer_args),
        )

    hook = register_module_forward_pre_hook(stand_ins.before_call)
    try:
        with _values_restored(leaves(inputs[:2])), _float64() if double else nullcontext():
            try:
                yield at
            finally:
                stand_ins.give_back()
    finally:
        hook.remove()
        set_random_states(states)


@contextmanager
def buffers_isolated() -> Iterator[None]:
    """Replace the buffers of modules by copies while a checkpoint runs the modules again."""
    stand_ins = _StandIns(double=False)

    def enter(module: torch.nn.Module, args: Args) -> None:
        if torch._C._current_graph_task_id() != -1:  # only in a backward pass: other threads may be training
            stand_ins.replace_in(module)

    hook = register_module_forward_pre_hook(enter)
    try:
        yield
    finally:
        hook.remove()
        stand_ins.give_back()


class _StandIns:
    """Replacements for the contents of tensors, and for the tensors of called modules, until `give_back`.

    Attributes:
        double: whether the computation is in float64.
        known: pairs (tensor, stand-in), by the id of the tensor. A tensor with exchanged contents is its own stand-in,
            and so is a stand-in. The pair keeps the tensor alive, so that no other tensor gets its id.
        replaced: (module, name, tensor, stand-in) for each tensor of a module that a stand-in replaces.
        exchanged: (tensor, other) for each tensor with exchanged contents. The other one has the user's contents.
    """

    def __init__(self, double: bool) -> None:
        self.double = double
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.replaced: list[tuple[torch.nn.Module, str, torch.Tensor, torch.Tensor]] = []
        self.exchanged: list[tuple[torch.Tensor, torch.Tensor]] = []

    def convert(self, leaf: object) -> Any:
        """Return a floating-point tensor in the dtype of the computation. Return any other value unchanged."""
        return leaf.double() if self.double and _is_floating(leaf) else leaf

    def move(self, own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return a leaf tensor with this value: the user's tensor ``own`` with other contents, or else a stand-in."""
        moved = torch.nn.Parameter(self.convert(value.detach()).clone())
        if own.is_leaf and own.requires_grad:
            try:
                _exchange(own, moved)
            except RuntimeError:  # another library has a weak reference to the contents
                return self._remember(own, moved)
            self.exchanged.append((own, moved))
            return self._remember(own, own)
        return self._remember(own, moved)

    def before_call(self, module: torch.nn.Module, args: Args) -> Any:
        """Replace the tensors of a module, and return its converted arguments. This is a pre-hook of modules."""
        self.replace_in(module)
        return tree_map(self.convert, args)

    def replace_in(self, module: torch.nn.Module) -> None:
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
                    self.replaced.append((part, name, own, stand_in))

    def give_back(self) -> None:
        """Restore all contents and the tensors of the modules, except those that other code has replaced since."""
        while self.replaced:
            module, name, own, stand_in = self.replaced.pop()
            if getattr(module, name) is stand_in:
                setattr(module, name, own)
        while self.exchanged:
            _exchange(*self.exchanged.pop())
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


class _Widened(TorchFunctionMode):
    """Convert all floating-point arguments of a function to float64 if one of them is in float64.

    So a loss may close over float32 data. PyTorch itself converts the operands of some functions only.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtypes = {leaf.dtype for leaf in leaves([args, kwargs]) if _is_floating(leaf)}
        if torch.float64 in dtypes and len(dtypes) > 1 and not _writes(func, kwargs):
            args, kwargs = (tree_map(lambda x: x.double() if _is_floating(x) else x, tree) for tree in (args, kwargs))
        return func(*args, **kwargs)


def _is_floating(leaf: object) -> TypeIs[torch.Tensor]:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _writes(func: object, kwargs: dict[str, object]) -> bool:
    """Tell whether a function writes to an argument. It must write to the user's tensor, not to a converted copy."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("__i", "__set")) or "out" in kwargs


@contextmanager
def _float64() -> Iterator[None]:
    """Make new tensors in float64, and convert other tensors that meet them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def _exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    """Exchange the contents of two tensors: memory, dtype, version, gradient accumulator.

    `torch.utils.swap_tensors` would also disable the gradient accumulators, to which DDP's hooks belong.
    """
    torch._C._swap_tensor_impl(a, b)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _values_restored(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Restore the values of tensors that an objective has written to, for example by ``clamp_``."""
    before = [(t, t.detach().clone()) for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, values in before:
                if not bool(((t == values) | ((t != t) & (values != values))).all()):
                    t.detach().copy_(values)


def random_states() -> list[torch.Tensor]:
    """Return the states of the global random generators: of the CPU, and of each GPU if they are in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else [])]


def set_random_states(states: list[torch.Tensor]) -> None:
    """Restore the states that `random_states` has returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])

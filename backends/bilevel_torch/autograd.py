"""Calls of `torch.autograd` on trees."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import GradientEdge

from bilevel.backend import R
from bilevel.spaces.array import H, P, V
from bilevel.spaces.tree import leaves, leaves_with_paths, tree_map, with_leaves
from bilevel.validation import check_scalar
from bilevel_torch.advice import FOREIGN, NOT_REENTRANT, advice
from bilevel_torch.graph import COMPILED_GRADIENT, check_compiled, functions_recorded, nodes_of, varies
from bilevel_torch.isolation import buffers_isolated
from bilevel_torch.shards import is_dtensor, local, placed


def as_graph_leaves(params: P, hparams: H) -> tuple[P, H]:
    """Return leaves of the graph: the user's tensors where they are leaves, else detached views.

    The user's tensors are kept because a loss that runs a module uses the module's parameters, not its arguments.

    Raises:
        ValueError: if a tensor occurs twice.
    """

    def variable(t: torch.Tensor) -> torch.Tensor:
        return t if t.requires_grad and t.is_leaf else t.detach().requires_grad_()

    check_distinct(params, hparams)
    return tree_map(variable, params), tree_map(variable, hparams)


def check_untransformed() -> None:
    """Raise a RuntimeError inside of a transform of torch.func, where no tensor can become a variable."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError as error:
        raise RuntimeError(
            "A hypergradient cannot be computed inside of a transform of torch.func (grad, jacrev, vmap, jvp). Loop "
            "over entries instead of vmap. Or make the training differentiable by bilevel_torch.implicit_minimizer, "
            "which works inside of transforms."
        ) from error


def check_distinct(params: object, hparams: object) -> None:
    """Raise a ValueError if a tensor occurs twice."""
    seen: dict[int, str] = {}
    for name, tree in (("params", params), ("hparams", hparams)):
        for path, leaf in leaves_with_paths(tree, name):
            if id(leaf) in seen:
                raise ValueError(
                    f"{path} is the same tensor as {seen[id(leaf)]}. Pass each tensor once, as "
                    "module.named_parameters() does with tied weights."
                )
            seen[id(leaf)] = path


def scalar(label: str, value: object) -> torch.Tensor:
    """Return the value of an objective. Raise a TypeError or ValueError unless it is a scalar tensor."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, float):
            way_out = "Do not call .item() on it."
        else:
            way_out = "Call it, and use its value." if callable(value) else "Use only the tensor of the loss."
        raise TypeError(f"{label}: expected a scalar tensor, got {type(value).__name__}. {way_out}")
    check_scalar(label, value)
    return value


def grad(
    outputs: Sequence[torch.Tensor] | Sequence[GradientEdge],
    inputs: Sequence[torch.Tensor],
    grad_outputs: Sequence[torch.Tensor | None] | None,
    **options: bool,
) -> list[torch.Tensor | None]:
    """Call autograd.grad. Return None where no output depends on an input, or an input requires no gradient.

    Gradient hooks of leaves do not fire, because they are for the user's gradients. Buffers keep their values when a
    checkpoint runs a module again.

    Raises:
        RuntimeError: from PyTorch, with advice. Errors of other types come from hooks, and get a note.
        TypeError: if a gradient is sparse.
    """
    grads: list[torch.Tensor | None] = [None] * len(inputs)
    places = [i for i, t in enumerate(inputs) if t.requires_grad]
    if not places or not any(varies(output) for output in outputs):
        return grads
    wanted = [inputs[i] for i in places]
    recorded = options.get("create_graph", False)
    again = functions_recorded(nodes_of(outputs)) if recorded else nullcontext()
    try:
        with advised(), _hooks_aside(wanted), buffers_isolated(), again:
            found = torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, **options)
    except Exception as error:
        if not isinstance(error, RuntimeError):
            error.add_note(FOREIGN)
        raise
    with torch.enable_grad() if recorded else nullcontext():
        for i, g in zip(places, found, strict=True):
            if g is not None and g.is_sparse:
                raise TypeError(
                    f"a gradient of shape {tuple(g.shape)} is sparse, and so has no second derivative. Leave out "
                    "sparse=True, as in torch.nn.Embedding(n, d)."
                )
            grads[i] = placed(g, inputs[i])
    return grads


@contextmanager
def _hooks_aside(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Disable the gradient hooks of leaves: a hook would change a product, or log the product as a gradient.

    The ``.grad`` that ``retain_grad()`` keeps for other tensors does not receive a product either.
    """
    hooked = [(t, t._backward_hooks) for t in tensors if t._backward_hooks and t.is_leaf]
    retained = [(t, t.grad) for t in tensors if t.retains_grad]
    for t, _ in hooked:
        t._backward_hooks = None
    for t, _ in retained:
        t.grad = None
    try:
        yield
    finally:
        for t, hooks in hooked:
            t._backward_hooks = hooks
        for t, kept in retained:
            t.grad = kept


_autocast: ContextVar[Sequence[tuple[str, torch.dtype]]] = ContextVar("the caller's autocast dtypes, by device")


@contextmanager
def solver_mode(tree: object) -> Iterator[None]:
    """Turn off recording, autocast on the devices of a tree, and NumPy's warnings: a status reports a bad number."""
    kinds = {t.device.type for t in leaves(tree) if isinstance(t, torch.Tensor)}
    cast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    before = _autocast.set(cast)
    try:
        with torch.no_grad(), np.errstate(all="ignore"), ExitStack() as stack:
            for kind, _ in cast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _autocast.reset(before)


def callers_autocast() -> Sequence[tuple[str, torch.dtype]]:
    """Return the devices and dtypes of the caller's autocast, inside of `solver_mode`."""
    return _autocast.get(())


def evaluate(function: Callable[..., R], *args: object) -> R:
    """Call a user's function with recording on and under the caller's autocast."""
    with torch.enable_grad(), ExitStack() as stack:
        for kind, dtype in callers_autocast():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        return function(*args)


def zeros_for_none(grads: Sequence[torch.Tensor | None], like: V) -> V:
    """Give gradients the structure of a tree, with zeros for None."""
    pairs = zip(grads, leaves(like), strict=True)
    return with_leaves(like, [torch.zeros_like(t, requires_grad=False) if g is None else g for g, t in pairs])


@contextmanager
def advised() -> Iterator[None]:
    """Add advice to errors of PyTorch in this block."""
    try:
        yield
    except RuntimeError as error:
        if (way_out := advice(str(error))) is None:
            raise
        raise RuntimeError(f"{way_out}\nPyTorch: {error}") from error


def reaches(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> bool:
    """Return whether any output depends on any of the inputs, which are leaves of the graph."""
    goals = {torch.autograd.graph.get_gradient_edge(t).node for t in inputs}
    return any(node in goals for node in nodes_of(outputs))


LEAF = "torch::autograd::AccumulateGrad"
SHARDED = (
    "Pass backend=bilevel_torch.Sharded(module) and module.parameters(), and compute the losses inside of "
    "`with backend.losses():` (docs/distributed.md)."
)


def check_recorded(label: str, nodes: Iterable[Any], params: object) -> None:
    """Raise if the graph of a loss lacks a dependence on params: a derivative would be wrong without an error.

    Raises:
        RuntimeError: for a reentrant checkpoint.
        ValueError: for a module that ran with its stored weights, where ``params`` are copies of them. (A penalty can
            still make the loss depend on params.) For parameters in another form, as `fully_shard` makes them.
    """
    # A view inside the graph also shares memory with its base, but it is not a copy. So only leaves are compared.
    named = [(path, t) for path, t in leaves_with_paths(params, "params") if t.is_leaf and local(t).numel()]
    if freed := [path for path, t in named if local(t).untyped_storage().size() == 0]:
        raise ValueError(f"{freed[0]} has no memory: the hooks of fully_shard have gathered it and freed it. {SHARDED}")
    handed = {local(t).data_ptr(): (path, t) for path, t in named}
    for node in nodes:
        name = node.name()
        if name == COMPILED_GRADIENT:
            check_compiled(label, [node])
        if name == "CheckpointFunctionBackward":
            raise RuntimeError(
                f"{label} hides parameters from autograd.grad by a reentrant checkpoint, so their derivatives would "
                f"be zero without an error. {NOT_REENTRANT}"
            )
        if name != LEAF:
            continue
        own = node.variable
        path, copy = handed.get(local(own).data_ptr(), ("", own)) if local(own).numel() else ("", own)
        if is_dtensor(copy) != is_dtensor(own):  # with one rank, both have the same memory
            raise ValueError(
                f"{label} was computed with another form of {path}: one is a DTensor, and one is a whole tensor, as "
                f"the hooks of fully_shard gather it. {SHARDED}"
            )
        if copy is not own:
            raise ValueError(
                f"{label} was computed with another tensor than {path}, which is a copy of it: a module uses its own "
                "weights. Run it by torch.func.functional_call(module, params, (x,)), or pass the module's own "
                "parameters."
            )


def check_computed(params: object, hparams: object, losses: Sequence[torch.Tensor]) -> None:
    """Raise a ValueError if a tensor that is computed from others cannot have the intended derivative.

    If one tensor is computed from another, the derivative counts twice. If no loss uses a tensor, it was most likely
    computed again after the losses.
    """
    tensors = [*leaves_with_paths(params, "params"), *leaves_with_paths(hparams, "hparams")]
    nodes = {path: torch.autograd.graph.get_gradient_edge(t).node for path, t in tensors if t.requires_grad}
    used: set[Any] = set()
    for path, t in tensors:
        if not t.requires_grad or t.is_leaf:
            continue
        if t._backward_hooks:
            raise ValueError(
                f"{path} has a gradient hook and is computed from other tensors, so the hook would act on every "
                "product. Register the hook on the other tensors."
            )
        above = set(nodes_of([t])) - {nodes[path]}
        for other, node in nodes.items():
            if node in above:
                raise ValueError(f"{path} is computed from {other}: pass one of them, or its gradient counts twice.")
        used = used or set(nodes_of(losses))
        if path.startswith("hparams") and nodes[path] not in used:
            raise ValueError(
                f"{path} is computed from other tensors, but no loss is computed from it. Compute it once, compute the "
                "losses with it, and pass the same tensor."
            )

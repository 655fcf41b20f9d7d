"""Nodes of the graph of autograd, and checks that its gradients can be differentiated."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import unwrap
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from bilevel_torch.advice import COMPILED, DIFFERENCES

COMPILED_NODE = "CompiledFunctionBackward"  # the name of a node of torch.compile
COMPILED_GRADIENT = "CompiledFunctionBackwardBackward"  # and of a node of its gradient


def varies(output: torch.Tensor | GradientEdge) -> bool:
    """Return whether an output has a derivative."""
    return isinstance(output, GradientEdge) or output.requires_grad


def nodes_of(outputs: Iterable[torch.Tensor | GradientEdge]) -> Iterator[Node]:
    """Yield the nodes of a graph."""
    edges = [t if isinstance(t, GradientEdge) else get_gradient_edge(t) for t in outputs if varies(t)]
    todo = [edge.node for edge in edges]
    seen = set(todo)
    while todo:
        node = todo.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                todo.append(child)


def check_compiled(label: str, nodes: Iterable[Node]) -> None:
    """Raise a RuntimeError if the gradient of a compiled function is in a graph: its derivative is wrong."""
    if any(node.name() == COMPILED_GRADIENT for node in nodes):
        raise RuntimeError(f"{label} contains the gradient of a compiled function. {COMPILED}")


@contextmanager
def functions_recorded(nodes: Iterable[Node]) -> Iterator[None]:
    """Raise a RuntimeError if a gradient in this block passes an autograd.Function that hides its dependences.

    PyTorch raises its own error about `once_differentiable` only if no other path leads to a parameter. With a penalty,
    there is another path, and PyTorch raises no error. The derivative of a compiled function's gradient omits all that
    the function has computed inside, such as the softmax of a linear layer, mostly without an error.
    """
    hiding: set[str] = set()

    def watch(node: Node) -> RemovableHandle | None:
        if not isinstance(node, BackwardCFunction):
            return None
        if node.name() == COMPILED_NODE:
            return node.register_hook(lambda *_: hiding.add(COMPILED_NODE))
        function: Any = node._forward_cls  # pyright: ignore[reportAttributeAccessIssue]
        once = _is_once(unwrap(function.backward, stop=_is_once))
        needed = [child is not None for child, _ in node.next_functions]

        def inspect(found: Sequence[torch.Tensor | None], given: Sequence[torch.Tensor | None]) -> None:
            # backward() is linear: if all its inputs are recorded, only zeros can be unrecorded outputs.
            recorded = all(g is None or g.requires_grad for g in given)
            cut = (g for g, need in zip(found, needed, strict=True) if need and g is not None and not g.requires_grad)
            if once or (recorded and any(g.any() for g in cut)):
                hiding.add(function.__name__)

        return node.register_hook(inspect)

    with _hooked(nodes, watch):
        yield
    if COMPILED_NODE in hiding:
        raise RuntimeError(f"{COMPILED} Or {DIFFERENCES}")
    if hiding:
        raise RuntimeError(
            f"The backward() of {', '.join(sorted(hiding))} has no derivative, so Hessian-vector products would omit "
            "it without an error. Compute it by differentiable operations on ctx.saved_tensors, without "
            f"once_differentiable, or {DIFFERENCES}"
        )


@contextmanager
def weight_norm_right(nodes: Iterable[Node]) -> Iterator[None]:
    """Raise a RuntimeError if a gradient in this block passes a weight_norm whose second derivative is wrong."""
    passed: list[bool] = []

    def watch(node: Node) -> RemovableHandle | None:
        if node.name() != "WeightNormInterfaceBackward0" or _weight_norm_is_right():
            return None
        return node.register_hook(lambda *_: passed.append(True))

    with _hooked(nodes, watch):
        yield
    if passed:
        raise RuntimeError(
            "The second derivative of torch.nn.utils.parametrizations.weight_norm is wrong in this version of PyTorch. "
            f"Write it out, as a parametrization that returns g * v / v.norm(dim=1, keepdim=True), or {DIFFERENCES}"
        )


@contextmanager
def _hooked(nodes: Iterable[Node], watch: Callable[[Node], RemovableHandle | None]) -> Iterator[None]:
    handles = [handle for node in nodes if (handle := watch(node)) is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_ONCE = once_differentiable(lambda _: None).__code__  # pyright: ignore[reportFunctionMemberAccess]


def _is_once(function: object) -> bool:
    return getattr(function, "__code__", None) is _ONCE


@cache
def _weight_norm_is_right() -> bool:
    with torch.enable_grad():
        v, g, along = (torch.ones(1, n, dtype=torch.float64, requires_grad=True) for n in (2, 1, 2))
        norm = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
        return torch.autograd.gradgradcheck(norm, (v, g), (along,), raise_exception=False)

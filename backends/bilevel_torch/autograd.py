"""Calls of `torch.autograd` on trees."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bilevel.tree import leaves_with_paths, tree_map
from bilevel.validation import check_scalar


def variables(params: Any, hparams: Any) -> tuple[Any, Any]:
    """Return leaves of the graph to differentiate in: the user's own where they are, else detached views.

    The user's own, because a loss that runs a module uses the module's parameters, not what it is handed.
    """

    def variable(t: torch.Tensor) -> torch.Tensor:
        return t if t.requires_grad and t.is_leaf else t.detach().requires_grad_()

    seen: dict[int, str] = {}
    for name, tree in (("params", params), ("hparams", hparams)):
        for path, leaf in leaves_with_paths(tree, name):
            if id(leaf) in seen:
                raise ValueError(
                    f"{path} is the same tensor as {seen[id(leaf)]}: pass each tensor once, as "
                    "module.named_parameters() does with tied weights."
                )
            seen[id(leaf)] = path
    return tree_map(variable, params), tree_map(variable, hparams)


def scalar(role: str, value: Any) -> torch.Tensor:
    """Return the value of an objective, checked."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{role}: expected a scalar tensor, got {type(value).__name__}: do not call .item() on it.")
    check_scalar(role, value)
    return value


def grad(
    outputs: Sequence[Any], inputs: Sequence[torch.Tensor], grad_outputs: Any, **options: bool
) -> Sequence[torch.Tensor | None]:
    """Call autograd.grad; None where an output does not depend on an input."""
    if not inputs or not any(output.requires_grad for output in outputs):
        return [None] * len(inputs)
    try:
        return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, **options)
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("double backward", "is not implemented", "create_graph=False")):
            raise RuntimeError(
                f"{error}\nA Hessian-vector product differentiates twice, which this operation does not support. Run "
                "the module uncompiled, attention within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and "
                "recurrent layers on CUDA within torch.backends.cudnn.flags(enabled=False); or differentiate once, by "
                'bl.Problem(inner, outer, curvature="finite-differences").'
            ) from error
        raise


def fill(grads: Sequence[torch.Tensor | None], like: Any) -> Any:
    """Give gradients the structure of a tree, with zeros for None."""
    it = iter(grads)
    return tree_map(lambda t: torch.zeros_like(t, requires_grad=False) if (g := next(it)) is None else g, like)


def reaches(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> bool:
    """Tell whether any output depends on any of the inputs, which are leaves of the graph; by walking it."""
    goals = {torch.autograd.graph.get_gradient_edge(t).node for t in inputs}
    todo = [torch.autograd.graph.get_gradient_edge(t).node for t in outputs if t.requires_grad]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node in goals:
            return True
        fresh = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= fresh
        todo.extend(fresh)
    return False

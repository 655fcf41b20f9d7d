"""Derivatives by autograd: one graph of ∇L, retained, serves every product."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from typing_extensions import override

from bilevel.problem import Problem
from bilevel.protocols import Backend, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.tree import leaves_with_paths, tree_map
from bilevel.validation import check_scalar, leaf_names
from bilevel_torch.space import TorchSpace, leaves


class TorchBackend(Backend):
    """PyTorch tensors on any device.

    Products are reverse over reverse: measured the fastest in eager PyTorch, and one dropout mask or batch
    normalisation serves all of them, since the forward pass is run once.
    """

    name = "torch"

    def __init__(self, space: TorchSpace | None = None) -> None:
        self.space = space or TorchSpace()

    @override
    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor)

    @override
    def leaves(self, tree: Any) -> list[tuple[str, Any]]:
        return list(leaves_with_paths(tree))

    @override
    def is_floating(self, leaf: Any) -> bool:
        return leaf.is_floating_point()

    @override
    def device(self, leaf: Any) -> str | None:
        return str(leaf.device)

    @override
    def devices(self) -> list[str]:
        return ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]

    @override
    def to_host(self, scalar: Any) -> Any:
        return scalar.item()

    @override
    def from_numpy(self, array: Any) -> Any:
        return torch.as_tensor(array)

    @override
    def to_numpy(self, array: Any) -> Any:
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    @override
    def inner(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        params, hparams = _variables(params, hparams)
        weights, hypers = leaves(params), leaves(hparams)
        with torch.enable_grad():
            value = _scalar("inner", problem.inner(params, hparams, *args))
            grads = _grad([value], weights, None, create_graph=True)
        if all(g is None for g in grads):
            raise ValueError(
                f"inner does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it, or "
                "hand over the module's own parameters (not a state_dict() or detached copies, which the module does "
                "not use)."
            )
        # Where ∇L is constant there is no second derivative, and autograd would refuse.
        varying = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]

        def pull(v: Any, variables: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
            if not varying:
                return [None] * len(variables)
            vs = leaves(v)
            return _grad([grads[i] for i in varying], variables, [vs[i] for i in varying], retain_graph=True)

        def hvp(v: Any) -> Any:
            return _fill(pull(v, weights), params)

        def cross_vjp(v: Any) -> Any:
            products = pull(v, hypers)
            return None if all(p is None for p in products) else _fill(products, hparams)

        @cache
        def transposable() -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
            """Return v and cross_vjp(v) with its graph: linear in v, so that its derivative by v is the transpose."""
            with torch.enable_grad():
                outputs = [g for g in grads if g is not None and g.requires_grad]
                v = [torch.zeros_like(g, requires_grad=True) for g in outputs]
                return v, _grad(outputs, hypers, v, create_graph=True)

        def cross_jvp(u: Any) -> Any:
            v, pulled = transposable()
            pairs = [(p, d) for p, d in zip(pulled, leaves(u), strict=True) if p is not None and p.requires_grad]
            products: list[torch.Tensor | None] = [None] * len(weights)
            if pairs:
                outputs, seeds = zip(*pairs, strict=True)
                for i, p in zip(varying, _grad(outputs, v, seeds, retain_graph=True), strict=True):
                    products[i] = p
            return _fill(products, params)

        grad = _fill([g if g is None else g.detach() for g in grads], params)
        return InnerDerivatives(grad, hvp, cross_vjp, cross_jvp)

    @override
    def inner_grad(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> Any:
        if type(problem) is not Problem:
            return super().inner_grad(problem, params, hparams, args)
        return self.outer(Problem(problem.inner, problem.inner), params, hparams, args).grad_params  # no second graph

    @override
    def outer(self, problem: Problem, params: Any, hparams: Any, args: tuple[Any, ...]) -> OuterDerivatives:
        params, hparams = _variables(params, hparams)
        weights, hypers = leaves(params), leaves(hparams)
        with torch.enable_grad():
            value = _scalar("outer", problem.outer(params, hparams, *args))
            grads = _grad([value], [*weights, *hypers], None)
        if all(g is None for g in grads):
            names = f"{leaf_names(self, 'params', params)} nor {leaf_names(self, 'hparams', hparams)}"
            raise ValueError(
                f"outer depends on neither {names}: is it "
                "detached, converted to a number, or computed by a module with other weights than params? "
                "(torch.func.functional_call runs a module with the weights it is given.)"
            )
        direct = grads[len(weights) :]
        return OuterDerivatives(
            value=value.detach(),
            grad_params=_fill(grads[: len(weights)], params),
            grad_hparams=None if all(g is None for g in direct) else _fill(direct, hparams),
        )

    @override
    def execute(self, function: Any, solver: Solver | None, problem: Problem, point: Point) -> Any:
        if torch.is_inference_mode_enabled() or any(t.is_inference() for t in leaves((point.params, point.hparams))):
            raise RuntimeError(
                "torch.inference_mode() keeps autograd from recording, so a hypergradient would be a silent zero: "
                "call this outside of it, with tensors that were made outside of it."
            )
        with torch.no_grad():  # the solver's own arithmetic is not recorded
            return function(self, solver, problem, point)


def _variables(params: Any, hparams: Any) -> tuple[Any, Any]:
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


def _scalar(role: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{role}: expected a scalar tensor, got {type(value).__name__}: do not call .item() on it.")
    check_scalar(role, value)
    return value


def _grad(
    outputs: Sequence[Any], inputs: Sequence[torch.Tensor], grad_outputs: Any, **options: bool
) -> Sequence[torch.Tensor | None]:
    """Call autograd.grad; None where an output does not depend on an input."""
    if not any(output.requires_grad for output in outputs):
        return [None] * len(inputs)
    try:
        return torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, **options)
    except RuntimeError as error:
        if "double backward" in str(error) or "is not implemented" in str(error):
            raise RuntimeError(
                f"{error}\nA Hessian-vector product differentiates twice, which this operation does not support. Run "
                "the module uncompiled, attention within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and "
                "recurrent layers on CUDA within torch.backends.cudnn.flags(enabled=False)."
            ) from error
        raise


def _fill(grads: Sequence[torch.Tensor | None], like: Any) -> Any:
    """Give gradients the structure of a tree, with zeros for None."""
    it = iter(grads)
    return tree_map(lambda t: torch.zeros_like(t, requires_grad=False) if (g := next(it)) is None else g, like)

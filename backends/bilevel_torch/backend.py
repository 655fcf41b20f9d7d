"""Derivatives by autograd: one graph of ∇L, retained, serves every product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from typing_extensions import override

from bilevel.problems.model_loss import ModelLoss
from bilevel.protocols import Backend, BilevelProblem, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.spaces.tree import leaves, leaves_with_paths
from bilevel.validation import check_dtypes, check_like, depends_on_nothing, leaf_names
from bilevel_torch.autograd import check_recorded, evaluate, fill, grad, own_arithmetic, reaches, scalar, variables
from bilevel_torch.gauss_newton import gauss_newton
from bilevel_torch.graph import nodes_of, weight_norm_right
from bilevel_torch.isolation import aside
from bilevel_torch.space import TorchSpace


class TorchBackend(Backend):
    """PyTorch tensors on any device.

    Products are reverse over reverse: measured the fastest in eager PyTorch, and one dropout mask or batch
    normalisation serves all of them, since the forward pass is run once.
    """

    name = "torch"
    keeps_derivatives = True

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
    def inner(self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        params, hparams = variables(params, hparams)
        return self.inner_of(evaluate(objective, params, hparams, *args), params, hparams)

    def inner_of(self, value: Any, params: Any, hparams: Any, role: str = "inner") -> InnerDerivatives:
        """Differentiate an inner objective that has been evaluated at params and hparams, its variables."""
        nodes = list(nodes_of([scalar(role, value)]))
        check_recorded(role, nodes, params)
        with weight_norm_right(nodes):
            grads = grad([value], leaves(params), None, create_graph=True)
        self._check_influence(role, any(g is not None for g in grads), params)
        return _products(grads, params, hparams)

    @override
    def gauss_newton(self, inner: ModelLoss, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        params, hparams = variables(params, hparams)
        grads, product = gauss_newton(inner, params, hparams, args)
        self._check_influence("inner", any(g is not None for g in grads), params)
        return _products(grads, params, hparams)._replace(hvp=product)

    @override
    def jacobian(
        self, function: Callable[..., Any], params: Any, hparams: Any, args: tuple[Any, ...], role: str
    ) -> InnerDerivatives:
        params, hparams = variables(params, hparams)
        value = evaluate(function, params, hparams, *args)
        check_like(self, role, value, "params", params)
        check_dtypes(self, role, value, "params", params)
        self._check_influence(role, reaches(leaves(value), leaves(params)), params)
        return _products(leaves(value), params, hparams)

    def _check_influence(self, role: str, has_influence: bool, params: Any) -> None:
        if not has_influence:
            raise ValueError(
                f"{role} does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it, "
                "or hand over these very tensors: the module's own parameters (not a state_dict() or detached copies, "
                "which the module does not use)."
            )

    @override
    def outer(
        self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...], role: str = "outer"
    ) -> OuterDerivatives:
        params, hparams = variables(params, hparams)
        return self.outer_of(evaluate(objective, params, hparams, *args), params, hparams, role)

    def outer_of(
        self, value: Any, params: Any, hparams: Any, role: str, retain_graph: bool = False
    ) -> OuterDerivatives:
        """Differentiate an objective in the outer role that has been evaluated at params and hparams."""
        weights, hypers = leaves(params), leaves(hparams)
        check_recorded(role, nodes_of([scalar(role, value)]), params)
        grads = grad([value], [*weights, *hypers], None, retain_graph=retain_graph)
        if all(g is None for g in grads):
            raise ValueError(
                f"{depends_on_nothing(self, role, params, hparams)}: is it detached, converted to a number, or "
                "computed by a module with other weights than params? (torch.func.functional_call runs a module with "
                "the weights it is given.)"
            )
        direct = grads[len(weights) :]
        return OuterDerivatives(
            value=value.detach(),
            grad_params=fill(grads[: len(weights)], params),
            grad_hparams=None if all(g is None for g in direct) else fill(direct, hparams),
        )

    @override
    def execute(self, function: Any, solver: Solver | None, problem: BilevelProblem, point: Point) -> Any:
        check_supported({"params": point.params, "hparams": point.hparams})
        with own_arithmetic(point.params):
            return function(self, solver, problem, point)

    @override
    @contextmanager
    def aside(self, point: Point, double: bool) -> Iterator[Callable[[Any, Any], Point]]:
        with aside(point, double) as at:
            yield at


def check_supported(tree: Any) -> None:
    """Raise for tensors whose derivatives would be silent zeros or wrong.

    Raises:
        RuntimeError: in inference mode, or for tensors that were made in it.
        TypeError: for sharded tensors.
    """
    tensors = [(path, t) for path, t in leaves_with_paths(tree) if isinstance(t, torch.Tensor)]
    if torch.is_inference_mode_enabled() or any(t.is_inference() for _, t in tensors):
        raise RuntimeError(
            "torch.inference_mode() keeps autograd from recording, so a hypergradient would be a silent zero: "
            "call this outside of it, with tensors that were made outside of it."
        )
    for path, t in tensors:
        if type(t).__name__ == "DTensor":  # importing the class takes as long as all of this package
            raise TypeError(
                f"{path} is a DTensor, but solvers take whole tensors. Gather them for the losses and the call "
                "(fully_shard gives modules unshard(); docs/distributed.md has a recipe), or replicate them, as "
                "DistributedDataParallel does, and use bilevel_torch.DataParallel."
            )


def _products(outputs: Sequence[torch.Tensor | None], params: Any, hparams: Any) -> InnerDerivatives:
    """Return a tree like params, None where it is zero, and products with its transposed Jacobians."""
    # Where ∇L is constant there is no second derivative, and autograd would refuse.
    varying = [i for i, r in enumerate(outputs) if r is not None and r.requires_grad]

    def pull(v: Any, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        vs = leaves(v)
        return grad([outputs[i] for i in varying], inputs, [vs[i] for i in varying], retain_graph=True)

    def hvp(v: Any) -> Any:
        return fill(pull(v, leaves(params)), params)

    def cross_vjp(v: Any) -> Any:
        products = pull(v, leaves(hparams))
        return None if all(p is None for p in products) else fill(products, hparams)

    @cache
    def transposable() -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
        """Return v and cross_vjp(v) with its graph: linear in v, so that its derivative by v is the transpose."""
        with torch.enable_grad():
            rs = [outputs[i] for i in varying]
            v = [torch.zeros_like(r, requires_grad=True) for r in rs]  # pyright: ignore[reportArgumentType]
            return v, grad(rs, leaves(hparams), v, create_graph=True)

    def cross_jvp(u: Any) -> Any:
        v, pulled = transposable()
        pairs = [(p, d) for p, d in zip(pulled, leaves(u), strict=True) if p is not None and p.requires_grad]
        products: list[torch.Tensor | None] = [None] * len(outputs)
        if pairs:
            for i, p in zip(
                varying, grad([p for p, _ in pairs], v, [d for _, d in pairs], retain_graph=True), strict=True
            ):
                products[i] = p
        return fill(products, params)

    value = fill([r if r is None else r.detach() for r in outputs], params)
    return InnerDerivatives(value, hvp, cross_vjp, cross_jvp)

"""Derivatives by autograd: one graph of ∇L, retained, serves every product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from typing_extensions import override

from bilevel.backend import Backend, Data, R
from bilevel.batch_sums import differentiated, linearized, over_micro_batches
from bilevel.dependence import warn
from bilevel.linearization import Dependence, Inputs, JointProduct, LinearizedMap, OuterDerivatives
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, H, P, V
from bilevel.spaces.tree import leaves, with_leaves
from bilevel.validation import check_dtypes, check_like, check_values, depends_on_nothing, leaf_names
from bilevel_torch.autograd import (
    LEAF,
    as_graph_leaves,
    check_recorded,
    check_untransformed,
    evaluate,
    grad,
    reaches,
    scalar,
    solver_mode,
    zeros_for_none,
)
from bilevel_torch.cpu_space import CpuSpace
from bilevel_torch.gauss_newton import gauss_newton
from bilevel_torch.graph import check_compiled, nodes_of, weight_norm_right
from bilevel_torch.isolation import isolated
from bilevel_torch.shards import is_dtensor
from bilevel_torch.space import TorchSpace
from bilevel_torch.steps import TorchSteps


class TorchBackend(Backend):
    """PyTorch tensors on any device.

    Products are reverse over reverse, which measured the fastest in eager PyTorch. The forward pass runs once, so all
    products share its dropout mask and batch statistics.
    """

    name = "torch"
    differentiates_arrays = True
    can_store_graphs = True

    def __init__(self, check_every: int | None = None) -> None:
        self.check_every = check_every

    @override
    def owns(self, leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor)

    @override
    def space(self, tree: V) -> TorchSpace[V]:
        if self.check_every is None and all(leaf.is_cpu for leaf in leaves(tree)):
            return CpuSpace(tree)
        return TorchSpace(tree, self.check_every)

    @override
    def steps(self, step: Callable[..., Any]) -> TorchSteps:
        return TorchSteps(self, step)

    @override
    def to_bytes(self, array: torch.Tensor) -> np.ndarray:
        flat = array.detach().cpu().contiguous().reshape(-1)
        return (flat.view(torch.uint8) if len(flat) else flat.new_zeros(0, dtype=torch.uint8)).numpy().copy()

    @override
    def from_bytes(self, array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        if not array.size:
            return torch.empty_like(like)
        return torch.from_numpy(array.copy()).view(like.dtype).reshape(like.shape).to(like.device)

    @override
    def is_floating(self, leaf: torch.Tensor) -> bool:
        return leaf.is_floating_point()

    @override
    def device(self, leaf: torch.Tensor) -> str | None:
        return str(leaf.device)

    @override
    def devices(self) -> list[str]:
        return ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]

    @override
    def check_leaf(self, path: str, leaf: torch.Tensor) -> None:
        check_recording(path, leaf)
        if is_dtensor(leaf):
            raise TypeError(
                f"{path} is a DTensor, a tensor that is sharded over ranks. Pass backend=bilevel_torch.Sharded(module) "
                "to bilevel_torch.backward or bilevel_torch.hypergradient, and compute the losses inside of "
                "backend.losses(): docs/distributed.md. For a module of fully_shard, bilevel_torch.FirstOrder needs no "
                "backend. Other functions need whole tensors, as under DistributedDataParallel."
            )

    @override
    def from_numpy(self, array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array)

    @override
    def to_numpy(self, array: torch.Tensor | np.ndarray) -> np.ndarray:
        if not isinstance(array, torch.Tensor):  # numbers of a CpuSpace
            return np.asarray(array)
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()

    @override
    @over_micro_batches(linearized)
    def inner(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        _warn_of_frozen(self, params)
        params, hparams = as_graph_leaves(params, hparams)
        value = evaluate(objective, params, hparams, *args)
        # A function may make tensors that require gradients, such as the inputs of a physics-informed loss.
        return self.inner_of(value, params, hparams, trainable=torch.nn.Parameter)

    def inner_of(
        self,
        value: object,
        params: P,
        hparams: H,
        label: str = "inner",
        trainable: type[torch.Tensor] = torch.Tensor,
    ) -> LinearizedMap[P, H]:
        """Differentiate the value of an inner objective in the variables params and hparams.

        Its dependence has other leaves of the type ``trainable``.
        """
        loss = scalar(label, value)
        nodes = list(nodes_of([loss]))
        check_recorded(label, nodes, params)
        with weight_norm_right(nodes):
            grads = grad([loss], leaves(params), None, create_graph=True)
        self._check_influence(label, any(g is not None for g in grads), params)
        return _products(grads, params, hparams, _others(nodes, params, hparams, trainable))

    @override
    @over_micro_batches(linearized)
    def gauss_newton(self, inner: ModelLoss, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        params, hparams = as_graph_leaves(params, hparams)
        grads, product = gauss_newton(inner, params, hparams, args)
        self._check_influence("inner", any(g is not None for g in grads), params)
        return _products(grads, params, hparams)._replace(vjp_params=product)

    @override
    @over_micro_batches(linearized)
    def jacobian(
        self, function: Callable[..., object], params: P, hparams: H, args: Args, label: str
    ) -> LinearizedMap[P, H]:
        params, hparams = as_graph_leaves(params, hparams)
        return self.jacobian_of(evaluate(function, params, hparams, *args), params, hparams, label)

    def jacobian_of(self, value: Any, params: P, hparams: H, label: str) -> LinearizedMap[P, H]:
        """Differentiate the value of a map in the variables params and hparams. It is a tree like params."""
        check_like(self, label, value, "params", params)
        check_dtypes(self, label, value, "params", params)
        check_compiled(label, nodes_of(leaves(value)))
        self._check_influence(label, reaches(leaves(value), leaves(params)), params)
        push = _pushes(_varying(leaves(value)), params, leaves(params))
        return _products(leaves(value), params, hparams)._replace(jvp_params=lambda v: push(leaves(v)))

    def _check_influence(self, label: str, has_influence: bool, params: object) -> None:
        if not has_influence:
            raise ValueError(
                f"{label} does not depend on {leaf_names(self, 'params', params)}. Use the params argument inside it, "
                "or pass the module's own parameters: the module does not use a state_dict() or detached copies."
            )

    @override
    @over_micro_batches(differentiated)
    def outer(
        self,
        objective: Callable[..., object],
        params: P,
        hparams: H,
        args: Args,
        *,
        label: str = "outer",
        data: Data = "outer",
    ) -> OuterDerivatives[P, H]:
        params, hparams = as_graph_leaves(params, hparams)
        return self.outer_of(evaluate(objective, params, hparams, *args), params, hparams, label, data)

    def outer_of(
        self,
        value: object,
        params: P,
        hparams: H,
        label: str = "outer",
        data: Data = "outer",
        retain_graph: bool = False,
    ) -> OuterDerivatives[P, H]:
        """Differentiate the value of an objective once in the variables params and hparams."""
        loss: Any = scalar(label, value)
        weights, hypers = leaves(params), leaves(hparams)
        check_recorded(label, nodes_of([loss]), params)
        grads = grad([loss], [*weights, *hypers], None, retain_graph=retain_graph)
        direct = grads[len(weights) :]
        used = Dependence(_found(grads[: len(weights)]), _found(direct))
        self._check_used(label, used, params, hparams)
        return OuterDerivatives(
            value=loss.detach(),
            grad_params=zeros_for_none(grads[: len(weights)], params),
            grad_hparams=zeros_for_none(direct, hparams) if any(used.hparams) else None,
            dependence=used,
        )

    def _check_used(self, label: str, used: Dependence, params: object, hparams: object) -> None:
        if not any(used.params) and not any(used.hparams):
            raise ValueError(
                f"{depends_on_nothing(self, label, params, hparams)}. Do not detach it or convert it to a number, and "
                "run modules with params (by torch.func.functional_call)."
            )

    @override
    def outers(self, objective: Callable[..., object], params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        params, hparams = as_graph_leaves(params, hparams)
        values: Any = evaluate(objective, params, hparams, *args)
        check_values(values)
        check_recorded("outer", nodes_of([values]), params)
        inputs = [*leaves(params), *leaves(hparams)]
        used: list[bool] = []

        def pull(seed: torch.Tensor) -> list[torch.Tensor]:
            grads = grad([values], inputs, [seed], retain_graph=True)
            used[:] = _found(grads)
            return zeros_for_none(grads, inputs)

        rows = self.by_rows.batched(pull, torch.eye(len(values), dtype=values.dtype, device=values.device))
        in_params, direct = rows[: len(leaves(params))], rows[len(leaves(params)) :]
        found = Dependence(used[: len(in_params)], used[len(in_params) :])
        self._check_used("outer", found, params, hparams)
        return OuterDerivatives(
            value=values.detach(),
            grad_params=with_leaves(params, in_params),
            grad_hparams=with_leaves(hparams, direct) if any(found.hparams) else None,
            dependence=found,
        )

    @property
    @override
    def by_rows(self) -> "TorchBackend":
        from bilevel_torch.rows import RowsBackend  # it imports this module

        return RowsBackend()

    @override
    def run(self, function: Callable[..., R], *args: Any, **options: Any) -> R:
        check_untransformed()
        with solver_mode(args):
            return function(self, *args, **options)

    @override
    @contextmanager
    def isolated(self, inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
        with isolated(inputs, double) as at:
            yield at


def check_recording(path: str, tensor: torch.Tensor) -> None:
    """Raise a RuntimeError in inference mode, or for a tensor that was made in inference mode."""
    if torch.is_inference_mode_enabled() or tensor.is_inference():
        raise RuntimeError(
            f"{path}: autograd does not record in torch.inference_mode(), so a hypergradient would be zero without an "
            "error. Make the call and the tensors outside of torch.inference_mode()."
        )


def _warn_of_frozen(backend: TorchBackend, params: object) -> None:
    """Warn about frozen parameters of a module, which are unknowns of the inner problem here."""
    frozen = [path for path, t in backend.leaves(params) if isinstance(t, torch.nn.Parameter) and not t.requires_grad]
    if frozen and any(t.requires_grad for t in leaves(params)):
        warn(
            f"params has frozen parameters next to trainable ones: {len(frozen)}, the first is params{frozen[0]}. "
            "Every leaf of params is an unknown of the inner problem, and solvers keep vectors for it. Leave them out: "
            "{name: p for name, p in module.named_parameters() if p.requires_grad}."
        )


def _others(
    nodes: Sequence[Node], params: object, hparams: object, trainable: type[torch.Tensor]
) -> list[tuple[int, ...]]:
    """Return the shapes of leaves of a graph that require gradients, have a type, and are no arguments."""
    known: list[torch.Tensor] = [*leaves(params), *leaves(hparams)]
    ids = {id(t) for t in known}
    leaf_nodes: list[Any] = [node for node in nodes if node.name() == LEAF]
    others = [n for n in leaf_nodes if id(n.variable) not in ids and isinstance(n.variable, trainable)]
    if others:  # arguments may be computed from other tensors
        sources = set(nodes_of(t for t in known if not t.is_leaf))
        others = [node for node in others if node not in sources]
    return [tuple(node.variable.shape) for node in others]


def _products(
    outputs: Sequence[torch.Tensor | None], params: P, hparams: H, others: Sequence[tuple[int, ...]] = ()
) -> LinearizedMap[P, H]:
    """Return a map with products of its Jacobians. The outputs are like the leaves of params; None stands for zero."""
    varying, count = _varying(outputs), len(outputs)  # products keep no outputs

    def pull(v: object, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        vs = leaves(v)
        return grad([*varying.values()], inputs, [vs[i] for i in varying], retain_graph=True)

    def vjp_params(v: P) -> P:
        return zeros_for_none(pull(v, leaves(params)), params)

    influences: list[bool] = []  # every product tells, and it costs nothing then

    def vjp_hparams(v: P) -> H | None:
        return in_hparams(pull(v, leaves(hparams)))

    def in_hparams(products: Sequence[torch.Tensor | None]) -> H | None:
        influences[:] = _found(products)
        return zeros_for_none(products, hparams) if any(influences) else None

    def vjp(v: P) -> tuple[P, H | None]:
        weights = leaves(params)
        products = pull(v, [*weights, *leaves(hparams)])
        return zeros_for_none(products[: len(weights)], params), in_hparams(products[len(weights) :])

    def dependence() -> Dependence:
        if not influences:
            vjp_hparams(params)  # any vector tells
        return Dependence([i in varying for i in range(count)], influences, others)

    push = _pushes(varying, params, leaves(hparams))
    value = zeros_for_none([r if r is None else r.detach() for r in outputs], params)
    joint = JointProduct((vjp_params, vjp_hparams), vjp)
    return LinearizedMap(value, vjp_params, vjp_hparams, lambda u: push(leaves(u)), dependence, joint=joint)


def _varying(outputs: Sequence[torch.Tensor | None]) -> dict[int, GradientEdge]:
    """Return the places of the outputs with a derivative, and where they are in the graph.

    Where ∇L is constant, there is no second derivative, and autograd would raise an error. Edges do not keep the values
    of the outputs.
    """
    return {i: get_gradient_edge(r) for i, r in enumerate(outputs) if r is not None and r.requires_grad}


def _pushes(
    varying: dict[int, GradientEdge], params: P, inputs: Sequence[torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], P]:
    """Return the product with the Jacobian of the outputs by the inputs. A product is like params."""

    @cache
    def transposable() -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
        """Return v and its pullback with a graph. It is linear in v, so its derivative by v is the transpose."""
        with torch.enable_grad():
            like = leaves(params)
            v = [torch.zeros_like(like[i], requires_grad=True) for i in varying]
            return v, grad([*varying.values()], inputs, v, create_graph=True)

    def push(u: Sequence[torch.Tensor]) -> P:
        v, pulled = transposable()
        pairs = [(p, d) for p, d in zip(pulled, u, strict=True) if p is not None and p.requires_grad]
        pushed = grad([p for p, _ in pairs], v, [d for _, d in pairs], retain_graph=True)
        products = dict(zip(varying, pushed, strict=True))
        return zeros_for_none([products.get(i) for i in range(len(leaves(params)))], params)

    return push


def _found(grads: Sequence[torch.Tensor | None]) -> list[bool]:
    return [g is not None for g in grads]

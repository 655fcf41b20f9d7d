"""Gauss-Newton products from the graph of one forward pass."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import torch

from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, P
from bilevel.spaces.tree import leaves, tree_map
from bilevel_torch.autograd import evaluate, grad, reaches, scalar, zeros_for_none


class Curved(NamedTuple, Generic[P]):
    """∂L/∂w with its graph (None: L does not depend on a leaf), and v -> Jᵀ (∂²loss/∂output²) J v + ∂²penalty v."""

    grads: list[torch.Tensor | None]
    product: Callable[[P], P]


def gauss_newton(inner: ModelLoss, params: P, hparams: object, args: Args) -> Curved[P]:
    """Differentiate at params, which are leaves of the graph.

    ∂L/∂w = Jᵀ s with s = ∂loss/∂output is linear in s. So its graph also gives J v, as the derivative of v·Jᵀs in s
    (the double-backward trick). The graph of s gives the Hessian of the loss, and the graph of the output gives Jᵀ.

    Raises:
        ValueError: if the output of the model does not depend on params.
    """
    weights, (x, targets) = leaves(params), inner.split(*args)
    with torch.enable_grad():
        output = tree_map(_own_node, evaluate(inner.model, params, hparams, x))
        if not reaches((z for z in leaves(output) if isinstance(z, torch.Tensor)), weights):
            raise ValueError(
                "the output of model does not depend on params. Run a module with the weights that are passed, by "
                "torch.func.functional_call(module, params, (x,)), and do not detach its output."
            )
        nodes = [z for z in leaves(output) if isinstance(z, torch.Tensor) and z.requires_grad]
        slopes = grad([scalar("loss", evaluate(inner.loss, output, *targets))], nodes, None, create_graph=True)
        nodes = [z for z, s in zip(nodes, slopes, strict=True) if s is not None]
        slopes = [_own_node(s) for s in slopes if s is not None]
        pulled = grad(nodes, weights, slopes, create_graph=True)
        penalty = _penalty_grads(inner, params, hparams)
        total = [b if a is None else a if b is None else a + b for a, b in zip(pulled, penalty, strict=True)]
    bent = [s for s in slopes if s.requires_grad]  # the loss is linear in the others

    def pull(
        grads: Sequence[torch.Tensor | None], vs: Sequence[torch.Tensor | None], inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        pairs = [(g, v) for g, v in zip(grads, vs, strict=True) if g is not None and v is not None and g.requires_grad]
        return grad([g for g, _ in pairs], inputs, [v for _, v in pairs], retain_graph=True)

    def product(v: P) -> P:
        vs = leaves(v)
        Jv = pull(pulled, vs, bent)
        HJv = pull(bent, Jv, nodes)
        products = zip(pull(nodes, HJv, weights), pull(penalty, vs, weights), strict=True)
        return zeros_for_none([b if a is None else a if b is None else a + b for a, b in products], params)

    return Curved(total, product)


def _own_node(t: Any) -> Any:
    """Return a view with its own node: if outputs are computed from each other, partial derivatives are needed."""
    return t.view_as(t) if isinstance(t, torch.Tensor) and t.requires_grad else t


def _penalty_grads(inner: ModelLoss, params: object, hparams: object) -> list[torch.Tensor | None]:
    weights = leaves(params)
    if inner.penalty is None:
        return [None] * len(weights)
    return grad([scalar("penalty", evaluate(inner.penalty, params, hparams))], weights, None, create_graph=True)

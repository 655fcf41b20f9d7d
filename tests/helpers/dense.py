"""Hypergradients by dense Hessians that the framework itself makes: references that share no code with the library."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def by_torch(inner: Any, outer: Any, params: Any, hparams: Any, damping: float = 0.0) -> np.ndarray:
    """Return dF/dλ as one vector, from the graphs of two losses."""
    import torch

    params, hparams = list(params), list(hparams)

    def flat(gradients: Sequence[Any], like: Sequence[Any]) -> Any:
        pairs = zip(gradients, like, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    def grad(output: Any, inputs: Sequence[Any], **options: Any) -> Any:
        if not output.requires_grad:
            return flat([None] * len(inputs), inputs)
        return flat(torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True, **options), inputs)

    slope = grad(inner, params, create_graph=True)
    hessian = torch.stack([grad(entry, params) for entry in slope])
    shifted = hessian.detach() + damping * torch.eye(len(slope), dtype=slope.dtype)
    adjoint = torch.linalg.solve(shifted, grad(outer, params))
    return (grad(outer, hparams) - grad(slope @ adjoint, hparams)).detach().numpy()


def by_jax(inner: Callable, outer: Callable, params: Any, hparams: Any, damping: float = 0.0) -> np.ndarray:
    """Return dF/dλ as one vector, from two functions of params and hparams."""
    import jax
    from jax.flatten_util import ravel_pytree

    (w, unravel), (h, unravel_h) = ravel_pytree(params), ravel_pytree(hparams)

    def slope(w: Any, h: Any) -> Any:
        return jax.grad(lambda w: inner(unravel(w), unravel_h(h)))(w)

    hessian, cross = jax.jit(jax.jacobian(slope, (0, 1)))(w, h)
    by_w, by_h = jax.jit(jax.grad(lambda w, h: outer(unravel(w), unravel_h(h)), (0, 1)))(w, h)
    hessian, cross, by_w, by_h = (np.asarray(a) for a in (hessian, cross, by_w, by_h))
    adjoint = np.linalg.solve(hessian + damping * np.eye(len(by_w), dtype=by_w.dtype), by_w)
    return by_h - cross.T @ adjoint

"""Hypergradients from two losses that a training loop has just computed."""

from numbers import Real
from typing import Any

import torch

from bilevel import hypergradient_from
from bilevel.convergence import OnFailure
from bilevel.protocols import InnerDerivatives, Linearization, OuterDerivatives, Tree
from bilevel.results import Hypergradient
from bilevel.spaces.tree import leaves
from bilevel.validation import check_trees, leaf_names
from bilevel_torch.autograd import check_computed, check_distinct, own_arithmetic
from bilevel_torch.backend import TorchBackend, check_supported
from bilevel_torch.data_parallel import this_process
from bilevel_torch.trees import tree_of


def backward(
    inner_loss: torch.Tensor,
    outer_loss: torch.Tensor,
    params: Any,
    hparams: Any,
    *,
    solver: Any = "cg",
    adjoint0: Tree | None = None,
    on_failure: OnFailure = "warn",
    loss_scale: float = 1.0,
    backend: TorchBackend | None = None,
) -> Hypergradient:
    """Add the hypergradient to the ``.grad`` of hparams, as ``loss.backward()`` adds a gradient.

    Hparams that are computed from other tensors pass it on to these; hooks on hparams fire. The ``.grad`` of params is
    not touched, and that of hparams only once the hypergradient is there and finite. The two losses keep their graphs,
    as after ``backward(retain_graph=True)``: a step of the inner optimizer may still use them, and they go when the
    losses do.

    See `hypergradient` for arguments, what is returned (the loss, the adjoint and how the solve went, for a log and the
    next call) and errors.

    >>> import torch, bilevel_torch
    >>> w, decay = torch.tensor([1.0], requires_grad=True), torch.tensor([0.5], requires_grad=True)
    >>> inner, outer = ((w - 1) ** 2).sum() + (decay * w**2).sum(), ((w - 2) ** 2).sum()
    >>> hg = bilevel_torch.backward(inner, outer, w, decay)
    >>> decay.grad, w.grad
    (tensor([1.3333]), None)
    """
    hg = hypergradient(
        inner_loss,
        outer_loss,
        params,
        hparams := tree_of("hparams", hparams),
        solver=solver,
        adjoint0=adjoint0,
        on_failure=on_failure,
        loss_scale=loss_scale,
        backend=backend,
    )
    torch.autograd.backward(leaves(hparams), leaves(hg.grad), retain_graph=True)
    return hg


def hypergradient(
    inner_loss: torch.Tensor,
    outer_loss: torch.Tensor,
    params: Any,
    hparams: Any,
    *,
    solver: Any = "cg",
    adjoint0: Tree | None = None,
    on_failure: OnFailure = "warn",
    loss_scale: float = 1.0,
    backend: TorchBackend | None = None,
) -> Hypergradient:
    """Return dF/dλ from the values of L and F and their graphs; see `bilevel.hypergradient` for the formula.

    No forward pass is run: the products come from the graph of ``inner_loss``, so that its dropout mask, its batch
    statistics and its precision are those of all products.

    Args:
        inner_loss: L, a scalar with its graph, computed from ``params`` and ``hparams`` with gradients on. Whatever is
            trained on, penalties included.
        outer_loss: F, likewise, from the same tensors as they still are: no optimizer step in between.
        params: w, the tensors that the inner optimizer trains: a tensor, a list, a dict, or an iterable such as
            ``module.parameters()`` or ``module.named_parameters()``, whose names appear in errors. Each tensor once.
            Where one requires no gradient (frozen layers) it counts as a constant, with an adjoint of zero; one that a
            loss does not use has a derivative of zero.
        hparams: λ, tensors of floating-point numbers that require gradients, likewise. They may have been computed from
            others (``log_decay.exp()``), and be anything in the graph of a loss: weights of losses or examples,
            penalties, data, the parameters of a network that makes data.
        solver: a linear solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object. Not
            ``unrolled``, which evaluates losses at other weights: it takes `bilevel.hypergradient`.
        adjoint0: a warm start: the ``adjoint`` of an earlier call. `bilevel.WarmStart` keeps it for you.
        on_failure: what to do unless the solve converged; "warn" raises all the same where the result is not finite.
        loss_scale: both losses are multiplied by it before they are differentiated, and the result is divided by it.
            For losses under autocast in float16, whose gradients underflow otherwise: ``scaler.get_scale()`` of the
            GradScaler, say. Hand over the losses unscaled.
        backend: a `TorchBackend`: `DataParallel` where ranks hold different batches. None: this process alone.

    Returns:
        A `bilevel.Hypergradient`; ``grad`` has the structure of hparams, ``adjoint`` that of params.

    Raises:
        TypeError, ValueError: for input that does not fit, naming the leaf; if a loss depends on none of params, or
            neither does on hparams.
        RuntimeError: from PyTorch, with what to do about it: for operations without a second derivative, params
            changed since, a graph already freed, inference mode, reentrant checkpoints.
        SolverError: if the solve failed and ``on_failure`` says so.

    Warns:
        UserWarning: if there are several ranks, but no backend is given.
    """
    if not (isinstance(loss_scale, Real) and 0 < loss_scale < float("inf")):
        raise ValueError(f"loss_scale: expected a finite number > 0, got {loss_scale!r}.")
    backend = this_process() if backend is None else backend
    params, hparams = tree_of("params", params), tree_of("hparams", hparams)
    adjoint0 = None if adjoint0 is None else tree_of("adjoint0", adjoint0)
    check_trees(backend, {"params": params, "hparams": hparams, "adjoint0": adjoint0}, {"adjoint0": "params"})
    _check_recorded(backend, inner_loss, outer_loss, params, hparams)
    with own_arithmetic(params):
        linearization = _linearize(backend, inner_loss, outer_loss, params, hparams, loss_scale)
        hg = hypergradient_from(linearization, solver=solver, adjoint0=adjoint0, backend=backend, on_failure=on_failure)
    return hg._replace(params=params)


def _check_recorded(backend: TorchBackend, inner_loss: Any, outer_loss: Any, params: Any, hparams: Any) -> None:
    """Raise unless the two losses can be differentiated in hparams and in some of params."""
    check_supported({"inner_loss": inner_loss, "outer_loss": outer_loss, "params": params, "hparams": hparams})
    check_distinct(params, hparams)
    for path, leaf in backend.leaves(hparams):
        if not leaf.requires_grad:
            raise ValueError(
                f"hparams{path} does not require a gradient, so that the losses do not know it: leave it out, or call "
                "requires_grad_() on it before they are computed (in Lightning, untoggle_optimizer())."
            )
    if not any(leaf.requires_grad for leaf in leaves(params)):
        raise ValueError(
            f"{leaf_names(backend, 'params', params)}: all frozen; none requires a gradient. Pass module.parameters(), "
            "not its state_dict(), and call requires_grad_() on them before the losses are computed (in Lightning, "
            "untoggle_optimizer())."
        )
    for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
        if isinstance(loss, torch.Tensor) and not loss.requires_grad:
            raise ValueError(
                f"{name} has no graph: compute it from params and hparams while they require gradients, outside of "
                "torch.no_grad(), and do not detach it."
            )
    check_computed(params, hparams, [loss for loss in (inner_loss, outer_loss) if isinstance(loss, torch.Tensor)])


def _linearize(
    backend: TorchBackend, inner_loss: Any, outer_loss: Any, params: Any, hparams: Any, loss_scale: float
) -> Linearization:
    inner, outer = inner_loss, outer_loss
    if loss_scale != 1.0:
        with torch.enable_grad():
            inner, outer = inner_loss * loss_scale, outer_loss * loss_scale
    # The losses may share part of their graphs.
    of_outer = backend.outer_of(outer, params, hparams, "outer_loss", retain_graph=True)
    of_inner = backend.inner_of(inner, params, hparams, "inner_loss")
    if loss_scale != 1.0:
        of_outer, of_inner = _unscaled(backend, of_outer, of_inner, loss_scale)

    def cross_vjp(v: Tree) -> Tree | None:
        product = of_inner.cross_vjp(v)
        if product is None and of_outer.grad_hparams is None:
            raise ValueError(
                f"Neither loss depends on {leaf_names(backend, 'hparams', hparams)}. Compute the losses with these "
                "very tensors, while they require gradients: not with copies, .data, .detach(), .item() or numbers "
                "made of them. (A term of inner_loss without params has no influence on them, and does not count. An "
                "optimizer's learning rate or weight_decay is in no loss: put a decay into inner_loss; a learning rate "
                "takes bl.FixedPoint and bl.Unrolled.)"
            )
        return product

    return Linearization(*of_outer, hvp=of_inner.hvp, cross_vjp=cross_vjp)


def _unscaled(
    backend: TorchBackend, outer: OuterDerivatives, inner: InnerDerivatives, scale: float
) -> tuple[OuterDerivatives, InnerDerivatives]:
    """Undo the scale, and hand vectors of ordinary size to half-precision products, which others do not survive."""
    space = backend.space

    def at_unit_size(product: Any) -> Any:
        def of(v: Tree) -> Tree | None:
            rms = (space.dot(v, v) / space.size(v)).sqrt()
            rms = torch.where(rms > 0, rms, 1.0)
            result = product(space.scale(1 / rms, v))
            return None if result is None else space.scale(rms / scale, result)

        return of

    direct = None if outer.grad_hparams is None else space.scale(1 / scale, outer.grad_hparams)
    unscaled = OuterDerivatives(outer.value / scale, space.scale(1 / scale, outer.grad_params), direct)
    return unscaled, inner._replace(hvp=at_unit_size(inner.hvp), cross_vjp=at_unit_size(inner.cross_vjp))

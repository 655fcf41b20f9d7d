"""Hypergradients from two losses that a training loop has computed."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from bilevel.backend import Backend
from bilevel.config import get_linear_solver
from bilevel.convergence import OnFailure, check_on_failure, report
from bilevel.dependence import Names, warn_of_dependence
from bilevel.hypergradient import SolverSpec, combine
from bilevel.inspection.derivatives import Derivatives
from bilevel.inspection.entries import entries
from bilevel.inspection.not_finite import described, find_not_finite, in_start
from bilevel.linear_solvers.linear_solver import LinearSolver
from bilevel.linearization import LinearizedMap, OuterDerivatives
from bilevel.methods.implicit import Implicit, pull_back
from bilevel.operators.lanczos import spectrum
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import Hypergradient
from bilevel.spaces.array import H, P
from bilevel.spaces.space import X
from bilevel.spaces.tree import leaves, tree_map
from bilevel.validation import check_trees, leaf_names
from bilevel_torch.autograd import (
    check_computed,
    check_distinct,
    check_recorded,
    check_untransformed,
)
from bilevel_torch.backend import TorchBackend
from bilevel_torch.data_parallel import this_process
from bilevel_torch.graph import nodes_of
from bilevel_torch.placement import add_to_grad
from bilevel_torch.trees import TensorTree, fill, prune, tree_of

NAMES = Names("inner_loss", "the gradient of inner_loss by params", "outer_loss")


def backward(
    inner_loss: torch.Tensor,
    outer_loss: torch.Tensor,
    params: TensorTree,
    hparams: TensorTree,
    *,
    solver: SolverSpec = "cg",
    adjoint0: TensorTree | None = None,
    on_failure: OnFailure = "warn",
    loss_scale: float = 1.0,
    backend: TorchBackend | None = None,
    accumulate: bool = True,
) -> Hypergradient:
    """Add the hypergradient to the ``.grad`` of hparams, as ``loss.backward()`` adds a gradient.

    If hparams are computed from other tensors, these receive the gradient. Hooks on hparams fire. The ``.grad`` of
    params does not change, and the ``.grad`` of hparams changes only if no error is raised. The two losses keep their
    graphs, as after ``backward(retain_graph=True)``, so a step of the inner optimizer can still use them.

    λ is in the graph of L. So ``inner_loss.backward()`` in a training step also adds ∂L/∂λ to the ``.grad`` of hparams.
    With ``accumulate=False``, the hypergradient replaces the content of ``.grad``. With True, zero it before the call.

    See `hypergradient` for arguments, the result (with the loss, the adjoint and the solve's status) and errors.

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
    add_to_grad(hparams, hg.grad, accumulate)
    return hg


def hypergradient(
    inner_loss: torch.Tensor,
    outer_loss: torch.Tensor,
    params: TensorTree,
    hparams: TensorTree,
    *,
    solver: SolverSpec = "cg",
    adjoint0: TensorTree | None = None,
    on_failure: OnFailure = "warn",
    loss_scale: float = 1.0,
    backend: TorchBackend | None = None,
) -> Hypergradient:
    """Return dF/dλ from the values of L and F and their graphs. See `bilevel.hypergradient` for the formula.

    No forward pass is run. All products use the graph of ``inner_loss``, with its dropout mask, batch statistics and
    precision.

    Args:
        inner_loss: L, a scalar with its graph: the whole training loss, with penalties, computed from ``params`` and
            ``hparams`` with gradients on.
        outer_loss: F, a scalar with its graph, computed from the same tensors, with no optimizer step in between.
        params: w, the tensors that the inner optimizer trains: a tensor, a list, a dict, or an iterable such as
            ``module.parameters()`` or ``module.named_parameters()``, whose names appear in errors. Pass each tensor
            once. A tensor that requires no gradient (a frozen layer) is a constant: no vector has entries for it. The
            derivative of a loss by a tensor that it does not use is zero.
        hparams: λ, floating-point tensors that require gradients, in the same forms as params. They may be computed
            from other tensors (``log_decay.exp()``), and may be anything in the graph of a loss: weights of losses or
            examples, penalties, data, the parameters of a network that makes data.
        solver: a linear solver: a name, a mapping with ``name`` and options, a TOML file, or a solver object. Use
            `bilevel.hypergradient` for ``unrolled``, which evaluates losses at other weights.
        adjoint0: a warm start: the ``adjoint`` of an earlier call. `bilevel.WarmStart` stores it for you.
        on_failure: "raise", "warn" or "ignore", for a solve that does not converge. "warn" raises if the result is not
            finite.
        loss_scale: a factor for both losses before they are differentiated; the result is divided by it. Use it for
            losses under autocast in float16, because their gradients can underflow: for example,
            ``scaler.get_scale()`` of a GradScaler. Pass the unscaled losses.
        backend: a `TorchBackend`, for example `DataParallel` if ranks have different batches. None: only this process.

    Returns:
        A `bilevel.Hypergradient`. ``grad`` has the structure of hparams, ``adjoint`` has the structure of params. The
        adjoint of a constant is a zero that takes no memory.

    Raises:
        TypeError, ValueError: for invalid input, naming the leaf; if a loss does not depend on params, or neither loss
            depends on hparams.
        RuntimeError: from PyTorch, with advice: for operations without a second derivative, params that have changed, a
            graph that is freed, inference mode, or reentrant checkpoints.
        SolverError: if the solve fails and ``on_failure`` requires an error.

    Warns:
        UserWarning: if there are several ranks and no backend is given.
    """
    if not (isinstance(loss_scale, Real) and 0 < loss_scale < float("inf")):
        hint = " Pass scaler.get_scale()." if isinstance(loss_scale, torch.amp.GradScaler) else ""
        raise ValueError(f"loss_scale: expected a finite number > 0, got {loss_scale!r}.{hint}")
    check_untransformed()
    backend = this_process() if backend is None else backend
    if not isinstance(backend, TorchBackend):
        raise TypeError(
            f"backend: expected a TorchBackend, such as bilevel_torch.DataParallel(), got {backend!r}. Leave it out in "
            "one process."
        )
    check_on_failure(on_failure)
    linear_solver = get_linear_solver(solver, "hypergradient from losses")
    w, h = tree_of("params", params), tree_of("hparams", hparams)
    v = None if adjoint0 is None else tree_of("adjoint0", adjoint0)
    check_trees(backend, {"params": w, "hparams": h, "adjoint0": v}, {"adjoint0": "params"})
    return backend.run(_hypergradient, (inner_loss, outer_loss), w, h, v, linear_solver, on_failure, loss_scale)


def _hypergradient(
    backend: Any,
    losses: tuple[torch.Tensor, torch.Tensor],
    w: P,
    h: H,
    v: P | None,
    solver: LinearSolver[Any],
    on_failure: OnFailure,
    loss_scale: float,
) -> Hypergradient[P, H]:
    _check_losses(backend, dict(zip(("inner_loss", "outer_loss"), losses, strict=True)), w, h)
    start = "no adjoint0" if v is None else "adjoint0"
    backend.check_settings(w, solver, start, f"loss_scale={loss_scale}", f"on_failure={on_failure!r}")
    # No vector has entries for frozen parameters: with a large frozen model, they would be most of the memory.
    frozen = [not t.requires_grad for t in leaves(w)]
    trained = prune(w, frozen)
    (value, cotangent, direct, used), at = _linearize(backend, losses, trained, h, loss_scale)

    def vjp_hparams(u: P) -> H | None:
        product = at.vjp_hparams(u)
        _check_influence(backend, product if direct is None else direct, h)
        return product

    A = LinearOperator(backend.space(trained), at.vjp_params)
    v = None if v is None else prune(v, frozen)
    pulled = pull_back(backend, solver, A, at._replace(vjp_hparams=vjp_hparams), cotangent, v)
    hg = combine(backend, value, direct, pulled, h)
    warn_of_dependence(backend, trained, h, used, pulled.dependence, NAMES)
    method = Implicit(solver)

    def find(own: Backend) -> str:
        of_outer, of_inner = _linearize(own, losses, trained, h, loss_scale)
        u = own.space(trained).normal(1)
        products = of_inner.vjp_params(u), of_inner.vjp_hparams(u)
        found = Derivatives(of_inner.residual, *products, of_outer.grad_params, of_outer.grad_hparams)
        inner, outer = (float(loss.detach()) for loss in losses)
        return described(find_not_finite(own, {"params": w, "hparams": h}, inner, outer, entries(own, found)))

    def locate() -> str:
        return in_start(backend, v) or backend.located(find, *losses)

    info = report(backend, hg.info, method, on_failure, curvature=lambda: spectrum(A), locate=locate)
    zeros = tree_map(lambda t: t.new_zeros(()).expand_as(t), w)  # views of one entry each
    return hg._replace(adjoint=fill(zeros, hg.adjoint), params=w, info=info)


def _check_losses(backend: TorchBackend, losses: dict[str, object], params: object, hparams: object) -> None:
    """Raise unless both losses have graphs, and all hparams and some params require gradients."""
    tensors = {name: loss for name, loss in losses.items() if isinstance(loss, torch.Tensor)}
    for name, loss in tensors.items():
        backend.check_leaf(name, loss)
    check_distinct(params, hparams)
    for path, leaf in backend.leaves(hparams):
        if not leaf.requires_grad:
            raise ValueError(
                f"hparams{path} does not require a gradient, so it is not in the graph of the losses. Leave it out, or "
                "call requires_grad_() on it before they are computed (in Lightning, untoggle_optimizer())."
            )
    if not any(leaf.requires_grad for leaf in leaves(params)):
        raise ValueError(
            f"{leaf_names(backend, 'params', params)}: all frozen; none requires a gradient. Pass module.parameters(), "
            "not its state_dict(), and call requires_grad_() on them before the losses are computed (in Lightning, "
            "untoggle_optimizer())."
        )
    for name, loss in tensors.items():
        if not loss.requires_grad:
            raise ValueError(
                f"{name} has no graph. Compute it from params and hparams while they require gradients, outside of "
                "torch.no_grad(), and do not detach it. An accuracy has no derivative, because argmax, comparisons and "
                "rounding have none: use a smooth loss, such as cross_entropy."
            )
    check_computed(params, hparams, list(tensors.values()))
    if any(constant := [not leaf.requires_grad for leaf in leaves(params)]):
        # A leaf of a state_dict() requires no gradient, but it shares memory with a weight in the graph.
        constants = prune(params, [not flag for flag in constant])
        for name, loss in tensors.items():
            check_recorded(name, nodes_of([loss]), constants)


def _linearize(
    backend: Any, losses: tuple[torch.Tensor, torch.Tensor], params: P, hparams: H, loss_scale: float
) -> tuple[OuterDerivatives[P, H], LinearizedMap[P, H]]:
    inner, outer = losses
    if loss_scale != 1.0:
        with torch.enable_grad():
            inner, outer = inner * loss_scale, outer * loss_scale
    # The losses may share part of their graphs, so the derivative of the first one must not free it.
    of_outer = backend.outer_of(outer, params, hparams, NAMES.outer, retain_graph=True)
    of_inner = backend.inner_of(inner, params, hparams, NAMES.inner)
    if loss_scale != 1.0:
        of_outer, of_inner = _unscaled(backend, of_outer, of_inner, loss_scale)
    return of_outer, of_inner


def _check_influence(backend: TorchBackend, derivative: H | None, hparams: H) -> None:
    if derivative is None:
        raise ValueError(
            f"Neither loss depends on {leaf_names(backend, 'hparams', hparams)}. Compute the losses with the same "
            "tensors, while they require gradients, not with copies, .data, .detach(), .item() or numbers. (A term "
            "of inner_loss without params has no influence on them, and does not count. An optimizer's learning "
            "rate or weight_decay is in no loss: put a decay into inner_loss; for a learning rate, use "
            "bl.FixedPoint and bl.Unrolled.)"
        )


def _unscaled(
    backend: TorchBackend, outer: OuterDerivatives[P, H], inner: LinearizedMap[P, H], scale: float
) -> tuple[OuterDerivatives[P, H], LinearizedMap[P, H]]:
    """Divide the derivatives by the scale of the losses.

    The products first scale their vectors to a root mean square of one. With other vectors, half precision may over- or
    underflow.
    """
    space = backend.space(outer.grad_params)

    def at_unit_size(product: Callable[[P], X | None]) -> Callable[[P], Any]:
        def of(v: P) -> X | None:
            rms: Any = space.norm(v) / space.size**0.5
            rms = space.xp.where(rms > 0, rms, 1.0)
            result = product(space.scale(1 / rms, v))
            return None if result is None else backend.space(result).scale(rms / scale, result)

        return of

    direct = outer.grad_hparams
    return outer._replace(
        value=outer.value / scale,
        grad_params=space.scale(1 / scale, outer.grad_params),
        grad_hparams=None if direct is None else backend.space(direct).scale(1 / scale, direct),
    ), inner._replace(
        residual=space.scale(1 / scale, inner.residual),
        vjp_params=at_unit_size(inner.vjp_params),
        vjp_hparams=at_unit_size(inner.vjp_hparams),
    )

"""Derivatives of an objective or map that is a sum or mean over micro-batches, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from bilevel.linearization import Dependence, LinearizedMap, OuterDerivatives
from bilevel.micro_batches import MicroBatches
from bilevel.spaces.array import Args, Array, H, P, V

if TYPE_CHECKING:
    from bilevel.backend import Backend

Method = TypeVar("Method", bound=Callable[..., Any])


def over_micro_batches(combine: Callable[..., Any]) -> Callable[[Method], Method]:
    """Extend a method (self, function, params, hparams, args, ...) of a backend to args that are `MicroBatches`.

    ``combine`` is `linearized` or `differentiated`. It calls the method on single micro-batches.
    """

    def decorate(method: Method) -> Method:
        @wraps(method)
        def extended(self: Backend, function: Any, params: Any, hparams: Any, args: Args, **options: Any) -> Any:
            def on(batch: Args) -> Any:
                return method(self, function, params, hparams, batch, **options)

            return combine(self, on, params, hparams, args) if isinstance(args, MicroBatches) else on(args)

        return extended  # pyright: ignore[reportReturnType]

    return decorate


def linearized(
    backend: Backend, on: Callable[[Args], LinearizedMap[P, H]], params: P, hparams: H, batches: MicroBatches
) -> LinearizedMap[P, H]:
    """Return a linearized map whose residual and products are sums over micro-batches.

    Each product linearizes the map again on each micro-batch, and keeps none of them: ``on(args)`` is alive only
    inside of a term.

    Raises:
        ValueError: by ``vjp_hparams``, if the residual has changed since the first pass over the micro-batches.
    """
    of_params, of_hparams = backend.space(params), backend.space(hparams)
    known: set[str] = set()
    influences: list[bool] = []
    used: list[Dependence] = []

    def summed(term: Callable[[LinearizedMap[P, H]], V], like: V) -> V:
        return _sum(backend, batches, lambda args: term(on(args)), like)

    def gradient(at: LinearizedMap[P, H]) -> tuple[P, Array]:
        known.update(name for name in ("jvp_hparams", "dependence", "jvp_params") if getattr(at, name) is not None)
        return at.residual, of_params.leaf(of_params.norm(at.residual))

    residual, size = summed(gradient, (params, of_params.leaf(of_params.norm(params))))

    def cross(at: LinearizedMap[P, H], v: P) -> tuple[H, P]:
        product = at.vjp_hparams(v)
        influences.append(product is not None)
        if at.dependence is not None:
            used.append(at.dependence())
        return of_hparams.zeros() if product is None else product, at.residual

    def vjp_hparams(v: P) -> H | None:
        influences.clear()
        used.clear()
        product, again = summed(lambda at: cross(at, v), (hparams, params))
        if not backend.compiles:
            _check_same(backend, residual, again, size)
        return product if any(influences) else None

    def dependence() -> Dependence:
        if not used:
            vjp_hparams(residual)
        return _union(used)

    return LinearizedMap(
        residual,
        vjp_params=lambda v: summed(lambda at: at.vjp_params(v), params),
        vjp_hparams=vjp_hparams,
        jvp_hparams=(lambda u: summed(lambda at: at.jvp_hparams(u), params)) if "jvp_hparams" in known else None,  # pyright: ignore[reportOptionalCall]
        dependence=dependence if "dependence" in known else None,
        jvp_params=(lambda v: summed(lambda at: at.jvp_params(v), params)) if "jvp_params" in known else None,  # pyright: ignore[reportOptionalCall]
    )


def differentiated(
    backend: Backend, on: Callable[[Args], OuterDerivatives[P, H]], params: P, hparams: H, batches: MicroBatches
) -> OuterDerivatives[P, H]:
    """Return the sums of the values and gradients of an objective over micro-batches."""
    influences: list[bool] = []
    used: list[Dependence | None] = []

    def term(args: Args) -> tuple[Array, P, H]:
        value, grad_params, grad_hparams, dependence = on(args)
        influences.append(grad_hparams is not None)
        used.append(dependence)
        return value, grad_params, backend.space(hparams).zeros() if grad_hparams is None else grad_hparams

    space = backend.space(params)
    like = space.leaf(space.norm(params)), params, hparams
    value, grad_params, grad_hparams = _sum(backend, batches, term, like)
    known = [dependence for dependence in used if dependence is not None]
    return OuterDerivatives(
        value, grad_params, grad_hparams if any(influences) else None, _union(known) if known else None
    )


def _sum(backend: Backend, batches: MicroBatches, term: Callable[[Args], V], like: V) -> V:
    """Return the sum, or the mean, of a term over micro-batches."""
    space = backend.space(like)
    total, weight = backend.fold(batches, lambda x, args, weight: space.axpy(weight, term(args), x), space.zeros())
    return space.scale(1 / weight, total) if batches.reduction == "mean" else total


def _check_same(backend: Backend, first: P, again: P, size: Array) -> None:
    """Raise a ValueError if the residual of another pass differs by more than rounding."""
    space = backend.space(first)
    change = float(backend.to_host(space.norm(space.subtract(first, again))))
    if change > space.eps**0.5 * float(backend.to_host(size)):  # nan is no change: a status reports it
        raise ValueError(
            "MicroBatches: the gradient of the inner objective differs between two passes over the micro-batches, by "
            f"{change:.2g}, so the Hessian-vector products are of different objectives. Pass a loader that gives the "
            "same examples in each pass: without random augmentation, without drop_last=True where it shuffles. Use "
            "eval() to turn off dropout."
        )


def _union(found: Sequence[Dependence]) -> Dependence:
    params, hparams = (
        [any(flags) for flags in zip(*(getattr(each, name) for each in found), strict=True)]
        for name in ("params", "hparams")
    )
    return Dependence(params, hparams, max((each.others for each in found), key=len))

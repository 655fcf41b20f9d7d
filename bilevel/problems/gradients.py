"""First derivatives of an inner objective, by the method that every backend has for an outer objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel.linearization import OuterDerivatives
from bilevel.spaces.array import Args, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend


@dataclass(frozen=True)
class _AsOuter:
    """An inner objective with the interface of an outer objective."""

    inner: Any

    def __call__(self, params: object, hparams: object, *args: object) -> Any:
        return self.inner(params, hparams, *args)

    def grad(self, params: P, hparams: H, *args: object) -> tuple[P, H | None]:
        """Return the pair that the numpy backend expects. The other backends differentiate the call."""
        slopes = (_method(self.inner, name)(params, hparams, *args) for name in ("grad", "grad_hparams"))
        return next(slopes), next(slopes)


@dataclass(frozen=True)
class _AtHparams:
    """An inner objective as a function of w only. It ignores its second argument."""

    inner: Any
    hparams: object

    def __call__(self, params: object, _: object, *args: object) -> Any:
        return self.inner(params, self.hparams, *args)

    def grad(self, params: P, _: object, *args: object) -> tuple[P, None]:
        return _method(self.inner, "grad")(params, self.hparams, *args), None


def in_params(
    backend: Backend, inner: Any, params: P, hparams: object, args: Args, unused: object = ()
) -> OuterDerivatives[P, Any]:
    """Return L and ∂L/∂w.

    ``grad_hparams`` is the derivative by ``unused``, arrays that L should not use. It is None if L does not use them.
    """
    return backend.outer(_AtHparams(inner, hparams), params, unused, args, label="inner", data="inner")


def in_hparams(backend: Backend, inner: Any, params: object, hparams: H, args: Args) -> H | None:
    """Return ∂L/∂λ; None if L does not depend on λ."""
    return backend.outer(_AsOuter(inner), params, hparams, args, label="inner", data="inner").grad_hparams


def _method(inner: Any, name: str) -> Any:
    if not hasattr(inner, name):
        raise TypeError(
            f"the inner objective ({getattr(inner, '__name__', type(inner).__name__)}) has no method {name!r}, which "
            "the numpy backend needs here: see bilevel.problems.protocols.InnerProblem. The torch and jax backends "
            "derive it: pass torch or JAX arrays."
        )
    return getattr(inner, name)

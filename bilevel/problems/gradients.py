"""First derivatives of an inner objective, by what every backend does for an outer one."""

from dataclasses import dataclass
from typing import Any

from bilevel.protocols import Backend, BilevelProblem, OuterDerivatives, Scalar, Tree


@dataclass(frozen=True)
class _AsOuter:
    """An inner objective in the place of an outer one."""

    inner: Any

    def __call__(self, params: Tree, hparams: Tree, *args: Any) -> Any:
        return self.inner(params, hparams, *args)

    def grad(self, params: Tree, hparams: Tree, *args: Any) -> tuple[Tree, Tree | None]:
        """Return the pair that the numpy backend expects; the other backends differentiate the call."""
        slopes = (_method(self.inner, name)(params, hparams, *args) for name in ("grad", "grad_hparams"))
        return next(slopes), next(slopes)


@dataclass(frozen=True)
class _AtHparams:
    """An inner objective as a function of w alone; what it is handed for λ, it leaves alone."""

    inner: Any
    hparams: Tree

    def __call__(self, params: Tree, _: Tree, *args: Any) -> Any:
        return self.inner(params, self.hparams, *args)

    def grad(self, params: Tree, _: Tree, *args: Any) -> tuple[Tree, None]:
        return _method(self.inner, "grad")(params, self.hparams, *args), None


def in_params(
    backend: Backend, inner: Any, params: Tree, hparams: Tree, args: tuple[Any, ...], beside: Tree = ()
) -> OuterDerivatives:
    """Return L and ∂L/∂w.

    ``grad_hparams`` is the derivative in ``beside``: arrays that L should not use, and None if it does not.
    """
    return backend.outer(_AtHparams(inner, hparams), params, beside, args, role="inner")


def in_hparams(backend: Backend, inner: Any, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> Tree | None:
    """Return ∂L/∂λ; None if L does not depend on λ."""
    return backend.outer(_AsOuter(inner), params, hparams, args, role="inner").grad_hparams


def inner_value_and_grad(
    backend: Backend, problem: BilevelProblem, params: Tree, hparams: Tree, args: tuple[Any, ...]
) -> tuple[Scalar | None, Tree]:
    """Return L and ∂L/∂w; of an equation, None and its residual."""
    inner = getattr(problem, "inner", None)
    if inner is None:
        return None, problem.derivatives(backend, params, hparams, args).grad
    value, grad, _ = in_params(backend, inner, params, hparams, args)
    return value, grad


def inner_grad(backend: Backend, problem: BilevelProblem, params: Tree, hparams: Tree, args: tuple[Any, ...]) -> Tree:
    """Return ∂L/∂w alone, or the residual of an equation, for who takes a step with it."""
    return inner_value_and_grad(backend, problem, params, hparams, args)[1]


def _method(inner: Any, name: str) -> Any:
    if not hasattr(inner, name):
        raise TypeError(
            f"the inner objective ({getattr(inner, '__name__', type(inner).__name__)}) has no method {name!r}, which "
            "the numpy backend needs here (see bilevel.problems). The torch and jax backends derive it: pass torch or "
            "JAX arrays."
        )
    return getattr(inner, name)

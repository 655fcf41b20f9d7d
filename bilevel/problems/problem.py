"""A bilevel problem is a pair of functions; nothing to inherit from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from bilevel.errors import suggest
from bilevel.problems.central_differences import finite_differences
from bilevel.problems.gradients import in_params
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Array, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend
    from bilevel.linearization import LinearizedMap

Curvature = Literal["hessian", "gauss-newton", "finite-differences"]


@dataclass(frozen=True)
class Problem:
    """Minimize ``outer(w*, λ)`` over λ, where ``w*`` minimizes ``inner(w, λ)`` over w.

    Both are called as ``f(params, hparams, *args)`` and return a scalar; ``args`` are the ``inner_args``
    and ``outer_args`` of the call, most often data. The torch and jax backends differentiate them. The
    numpy backend needs objects with analytic derivatives: see `bilevel.problems.protocols.InnerProblem` and
    `bilevel.problems.protocols.OuterObjective`, and `bilevel.problems` for ready ones.

    Problems of the same functions are equal, so a problem may be built anew at each call.

    Args:
        inner: L, the inner objective.
        outer: F, the outer objective.
        curvature: what stands for ∂²L/∂w². "hessian": itself. "gauss-newton": see `from_model`.
            "finite-differences": for an L that can be differentiated only once; see
            `bilevel.problems.central_differences.finite_differences` for its accuracy and for what it asks of L.

    Raises:
        TypeError: if one of the two cannot be called.
        ValueError: if there is no such curvature.
    """

    inner: Callable[..., object]
    outer: Callable[..., object]
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        check_functions(self, inner="a scalar", outer="a scalar")
        if self.curvature not in get_args(Curvature):
            raise ValueError(
                f"Problem.curvature: there is no {self.curvature!r}."
                + suggest(str(self.curvature), get_args(Curvature))
            )
        if self.curvature == "gauss-newton" and not isinstance(self.inner, ModelLoss):
            raise TypeError(
                "Problem.curvature: Gauss-Newton products need to know the model from its loss; use "
                "bl.Problem.from_model(model, loss, outer)."
            )

    @classmethod
    def from_model(
        cls,
        model: Callable[..., object],
        loss: Callable[..., object],
        outer: Callable[..., object],
        *,
        penalty: Callable[..., object] | None = None,
        curvature: Curvature = "gauss-newton",
    ) -> Problem:
        """Return the problem with L = loss(model(w, λ, x), *targets) + penalty(w, λ) and Gauss-Newton curvature.

        ∂²L/∂w² is replaced by Jᵀ (∂²loss/∂output²) J + ∂²penalty/∂w² with J = ∂output/∂w (Schraudolph 2002): positive
        semidefinite where loss is convex in the output and penalty in w, however far the training has come. It is the
        Hessian where the model is linear in w or the loss's slope vanishes; else the hypergradient is biased. ∂²L/∂λ∂w
        stays exact. In torch a product takes 1.3 times the floating-point operations of a gradient on dense networks
        and transformers, where the Hessian takes 1.9, and as many as the Hessian on convolutional ones (counted by
        torch's FlopCounterMode). For the torch and jax backends.

        Args:
            model: (params, hparams, x) -> output, any tree of arrays. Whatever the loss needs of λ goes into it: a
                weight per training example, say, as in ``(logits, hparams)``.
            loss: (output, *targets) -> scalar, convex in what of the output depends on params.
            outer: F, as in `Problem`.
            penalty: (params, hparams) -> scalar, a regulariser; None: none.
            curvature: as in `Problem`; "hessian" shows what Gauss-Newton leaves out.

        Returns:
            The problem; its ``inner_args`` are ``(x, *targets)``.

        Raises:
            TypeError: if one of the functions cannot be called.
            ValueError: if there is no such curvature.
        """
        return cls(ModelLoss(model, loss, penalty), outer, curvature)

    @property
    def kind(self) -> Curvature:
        """The curvature."""
        return self.curvature

    def linearize(self, backend: Backend, params: P, hparams: H, args: tuple[object, ...]) -> LinearizedMap[P, H]:
        """Differentiate ∂L/∂w at a point, with the curvature asked for."""
        if self.curvature == "finite-differences":
            return finite_differences(backend, self.inner, params, hparams, args)
        if isinstance(self.inner, ModelLoss) and self.curvature == "gauss-newton":
            return backend.gauss_newton(self.inner, params, hparams, args)
        return backend.inner(self.inner, params, hparams, args)

    def value_and_residual(
        self, backend: Backend, params: P, hparams: H, args: tuple[object, ...]
    ) -> tuple[Array | None, P]:
        """Return L and ∂L/∂w."""
        value, grad, _ = in_params(backend, self.inner, params, hparams, args)
        return value, grad


def check_functions(owner: object, **returns: str) -> None:
    """Raise a TypeError unless these attributes can be called."""
    for role, what in returns.items():
        if not callable(getattr(owner, role)):
            raise TypeError(
                f"{type(owner).__name__}.{role}: expected a function of (params, hparams, *args) that returns {what}, "
                f"got {type(getattr(owner, role)).__name__}."
            )

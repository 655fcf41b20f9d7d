"""A bilevel problem as a pair of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from bilevel.options import check_choice
from bilevel.problems.central_differences import finite_differences
from bilevel.problems.gradients import in_params
from bilevel.problems.model_loss import ModelLoss
from bilevel.spaces.array import Args, Array, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend
    from bilevel.linearization import LinearizedMap

Curvature = Literal["hessian", "gauss-newton", "finite-differences"]


@dataclass(frozen=True)
class Problem:
    """Minimize ``outer(w*, λ)`` over λ, where ``w*`` minimizes ``inner(w, λ)`` over w.

    Both are called as ``f(params, hparams, *args)`` and return a scalar. ``args`` are the ``inner_args`` or
    ``outer_args`` of the call, most often data. The torch and jax backends differentiate the functions. The numpy
    backend needs objects with analytic derivatives: see `bilevel.problems.protocols.InnerProblem` and
    `bilevel.problems.protocols.OuterObjective`, and `bilevel.problems` for ready objects.

    Problems of the same functions are equal, so you may build a problem again for each call.

    Args:
        inner: L, the inner objective.
        outer: F, the outer objective.
        curvature: ∂²L/∂w² ("hessian") or an approximation. "gauss-newton": see `from_model`. "finite-differences": for
            an L with only first derivatives; see `bilevel.problems.central_differences.finite_differences` for its
            accuracy and requirements.

    Raises:
        TypeError: if ``inner`` or ``outer`` cannot be called.
        ValueError: for an unknown curvature.
    """

    inner: Callable[..., object]
    outer: Callable[..., object]
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        check_functions(self, inner="a scalar", outer="a scalar")
        check_choice("Problem.curvature", self.curvature, get_args(Curvature))
        if self.curvature == "gauss-newton" and not isinstance(self.inner, ModelLoss):
            raise TypeError(
                "Problem.curvature: Gauss-Newton products need a model and its loss as separate functions. Use "
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

        ∂²L/∂w² is replaced by Jᵀ (∂²loss/∂output²) J + ∂²penalty/∂w² with J = ∂output/∂w (Schraudolph 2002). This
        matrix is positive semidefinite at any stage of the training if loss is convex in the output and penalty is
        convex in w. It equals the Hessian if the model is linear in w or ∂loss/∂output is zero. Otherwise the
        hypergradient is biased. ∂²L/∂λ∂w stays exact. In torch, on dense networks and transformers, a product takes 1.3
        times the floating-point operations of a gradient; a Hessian-vector product takes 1.9 times. On convolutional
        networks, both take the same (counted by torch's FlopCounterMode). For the torch and jax backends.

        Args:
            model: (params, hparams, x) -> output, any tree of arrays. If the loss needs λ, add it to the output: for
                example, ``(logits, hparams)`` for a weight per training example.
            loss: (output, *targets) -> scalar, convex in the part of the output that depends on params.
            outer: F, as in `Problem`.
            penalty: (params, hparams) -> scalar, a regularizer; None: no penalty.
            curvature: as in `Problem`. Use "hessian" to measure the bias of Gauss-Newton.

        Returns:
            The problem. Its ``inner_args`` are ``(x, *targets)``.

        Raises:
            TypeError: if one of the functions cannot be called.
            ValueError: for an unknown curvature.
        """
        return cls(ModelLoss(model, loss, penalty), outer, curvature)

    @property
    def kind(self) -> Curvature:
        """The curvature."""
        return self.curvature

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate ∂L/∂w at a point, with the chosen curvature."""
        if self.curvature == "finite-differences":
            return finite_differences(backend, self.inner, params, hparams, args)
        if isinstance(self.inner, ModelLoss) and self.curvature == "gauss-newton":
            return backend.gauss_newton(self.inner, params, hparams, args)
        return backend.inner(self.inner, params, hparams, args)

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[Array | None, P]:
        """Return L and ∂L/∂w."""
        value, grad, *_ = in_params(backend, self.inner, params, hparams, args)
        return value, grad


def check_functions(owner: object, **returns: str) -> None:
    """Raise a TypeError unless these attributes can be called."""
    for role, what in returns.items():
        if not callable(getattr(owner, role)):
            raise TypeError(
                f"{type(owner).__name__}.{role}: expected a function of (params, hparams, *args) that returns {what}, "
                f"got {type(getattr(owner, role)).__name__}."
            )

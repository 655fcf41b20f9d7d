"""Products with second derivatives, by central differences of first derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bilevel.linearization import LinearizedMap
from bilevel.problems.gradients import in_hparams, in_params
from bilevel.spaces.array import Args, H, P, V
from bilevel.spaces.space import Space

if TYPE_CHECKING:
    from bilevel.backend import Backend

FLOAT32_EPS = 2.0**-23
STEP = 2.0


def finite_differences(backend: Backend, inner: Any, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
    """Differentiate an inner objective that has only first derivatives, with two gradients per product.

    Use it for operations without a second derivative (flash attention, modules under ``torch.compile``), and for NumPy
    objects that have only ``grad`` and ``grad_hparams`` (∂L/∂w and ∂L/∂λ; None for zero).

        ∂²L/∂w² v    ≈ (∂L/∂w(w + εv, λ) − ∂L/∂w(w − εv, λ)) / 2ε
        (∂²L/∂λ∂w)ᵀ v ≈ (∂L/∂λ(w + εv, λ) − ∂L/∂λ(w − εv, λ)) / 2ε

    with ‖εv‖ = 2 · eps^(1/3) · max(1, rms of w): 1e-2 in float32, 1e-5 in float64 for weights of about one or less.
    Measured on tanh and GELU networks and a transformer of 2,000 to 70,000 weights, before and after training, the
    relative errors were 1e-5 to 3e-2 in float32 and 2e-11 to 1e-7 in float64. The vectors were random, gradients,
    single weights and the direction of largest curvature. The best length differed by a factor of at most about 30.
    Do not set a solver's ``rtol`` below these errors. With kinks (ReLU), the differences belong to a smoothed L.

    L is evaluated at other weights than ``params``, so it must compute with the weights that are passed (in PyTorch:
    `torch.func.functional_call`). Each evaluation runs its own forward pass. With dropout or other random numbers, the
    two evaluations use different functions, and the products are wrong. Turn off rounding of float32 matrix products
    (TF32, bfloat16 passes).

    Raises:
        TypeError: for floating-point types coarser than float32.
        ValueError: if L does not compute with the weights that are passed.
    """
    of_params, of_hparams = backend.space(params), backend.space(hparams)
    _check_precision(backend, params, hparams)
    eps = max(of_params.eps, of_hparams.eps)
    w = of_params.copy(params)  # new arrays, to test whether L uses the arrays that are passed
    here = in_params(backend, inner, w, hparams, args, unused=params)
    if here.grad_hparams is not None:
        raise ValueError(
            "inner computes with the arrays of params, not with the arrays that are passed, so its finite differences "
            "would be wrong. In PyTorch, run the module by torch.func.functional_call(module, params, (x,)) inside it."
        )

    def along(space: Space[V], x: V, v: V, result: Space[Any], grad: Callable[[V], Any]) -> Any:
        """Return the derivative of grad at x along v."""
        xp, top = space.xp, space.max_abs(v)
        top = xp.where(top == 0, 1.0, top)
        v = space.scale(1 / top, v)  # now its norm cannot under- or overflow
        size = space.norm(v)
        size = xp.where(size == 0, 1.0, size)
        h = STEP * eps ** (1 / 3) * xp.clip(space.norm(x) / space.size**0.5, 1.0, None)
        high, low = (grad(space.axpy(sign * h / size, v, x)) for sign in (1, -1))
        return None if high is None else result.scale(top * size / (2 * h), result.subtract(high, low))

    def grad_at(w: P, h: H) -> P:
        return in_params(backend, inner, w, h, args).grad_params

    return LinearizedMap(
        here.grad_params,
        vjp_params=lambda v: along(of_params, w, v, of_params, lambda w: grad_at(w, hparams)),
        vjp_hparams=lambda v: along(
            of_params, w, v, of_hparams, lambda w: in_hparams(backend, inner, w, hparams, args)
        ),
        jvp_hparams=lambda u: along(of_hparams, hparams, u, of_params, lambda h: grad_at(w, h)),
    )


def _check_precision(backend: Backend, params: object, hparams: object) -> None:
    for name, tree in (("params", params), ("hparams", hparams)):
        for path, leaf in backend.leaves(tree):
            if backend.space(leaf).eps > FLOAT32_EPS:
                raise TypeError(
                    f"{name}{path} is {leaf.dtype}, which is too coarse for differences of gradients. Use float32 or "
                    'float64 for curvature="finite-differences".'
                )

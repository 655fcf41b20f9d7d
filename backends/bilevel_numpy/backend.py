"""Analytic derivatives of the problem, checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.backend import Backend, Data, R
from bilevel.batch_sums import differentiated, linearized, over_micro_batches
from bilevel.linearization import Inputs, LinearizedMap, OuterDerivatives
from bilevel.spaces.array import Args, H, P, V
from bilevel.spaces.tree import leaves, tree_map
from bilevel.validation import check_dtypes, check_like, check_scalar, check_values
from bilevel_numpy.space import NumpySpace
from bilevel_numpy.steps import NumpySteps


class NumpyBackend(Backend):
    """NumPy arrays and objects with analytic ``grad``, ``hvp`` and ``cross_vjp``."""

    name = "numpy"

    @override
    def owns(self, leaf: object) -> bool:
        return isinstance(leaf, np.ndarray | np.generic)

    @override
    def space(self, tree: V) -> NumpySpace[V]:
        return NumpySpace(tree)

    @override
    def steps(self, step: Callable[..., Any]) -> NumpySteps:
        for method in ("vjp_params", "vjp_hparams"):
            _require(step, "the step", method)
        return NumpySteps(self, step)

    @override
    def is_floating(self, leaf: np.ndarray) -> bool:
        return np.issubdtype(leaf.dtype, np.floating)

    @override
    def from_numpy(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    @override
    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array)

    @override
    @over_micro_batches(linearized)
    def inner(self, objective: Any, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        for method in ("grad", "hvp", "cross_vjp"):
            _require(objective, "the inner objective", method)

        def hvp(v: P) -> P:
            product = objective.hvp(params, hparams, v, *args)
            return self._like("the inner hvp", product, "params", params)

        def cross_vjp(v: P) -> H | None:
            product = objective.cross_vjp(params, hparams, v, *args)
            return None if product is None else self._like("the inner cross_vjp", product, "hparams", hparams)

        def cross_jvp(u: H) -> P:
            if not hasattr(objective, "cross_jvp"):
                raise TypeError(
                    f"the inner objective ({type(objective).__name__}) has no method 'cross_jvp', which forward mode "
                    "needs on the numpy backend: cross_jvp(params, hparams, vector, *args) returns (∂²L/∂λ∂w) vector "
                    'for a vector like hparams. mode="reverse" does not need it.'
                )
            product = objective.cross_jvp(params, hparams, u, *args)
            return self._like("the inner cross_jvp", product, "params", params)

        grad = self._like("the inner grad", objective.grad(params, hparams, *args), "params", params)
        return LinearizedMap(grad, hvp, cross_vjp, cross_jvp)

    @override
    @over_micro_batches(linearized)
    def jacobian(self, function: Any, params: P, hparams: H, args: Args, label: str) -> LinearizedMap[P, H]:
        for method in ("vjp_params", "vjp_hparams"):
            _require(function, f"the {label}", method)

        def vjp_params(v: P) -> P:
            product = function.vjp_params(params, hparams, v, *args)
            return self._like(f"the {label}'s vjp_params", product, "params", params)

        def vjp_hparams(v: P) -> H | None:
            product = function.vjp_hparams(params, hparams, v, *args)
            return None if product is None else self._like(f"the {label}'s vjp_hparams", product, "hparams", hparams)

        def jvp_params(v: P) -> P:
            product = function.jvp_params(params, hparams, v, *args)
            return self._like(f"the {label}'s jvp_params", product, "params", params)

        value = function(params, hparams, *args)
        check_like(self, label, value, "params", params)
        check_dtypes(self, label, value, "params", params)
        push = jvp_params if hasattr(function, "jvp_params") else None
        return LinearizedMap(value, vjp_params, vjp_hparams, jvp_params=push)

    @override
    @over_micro_batches(differentiated)
    def outer(
        self,
        objective: Any,
        params: P,
        hparams: H,
        args: Args,
        *,
        label: str = "outer",
        data: Data = "outer",
    ) -> OuterDerivatives[P, H]:
        return self._outer(objective, params, hparams, args, label)

    @override
    def outers(self, objective: Any, params: P, hparams: H, args: Args) -> OuterDerivatives[P, H]:
        return self._outer(objective, params, hparams, args, "outer", many=True)

    def _outer(
        self, objective: Any, params: P, hparams: H, args: Args, label: str, many: bool = False
    ) -> OuterDerivatives[P, H]:
        """Evaluate an objective with one value, or with ``many`` values and a leading axis in its gradients."""
        _require(objective, f"the {label} objective", "grad")
        value: Any = np.asarray(objective(params, hparams, *args))
        if many:
            check_values(value)
        else:
            check_scalar(label, value)
        grads = objective.grad(params, hparams, *args)
        if not isinstance(grads, tuple) or len(grads) != 2:
            raise TypeError(f"the {label} grad: expected the pair (∂F/∂w, ∂F/∂λ), the second None for zero.")

        def like(i: int, name: str, reference: V) -> V:
            if many:
                reference = tree_map(lambda a: np.broadcast_to(a, (*value.shape, *a.shape)), reference)
                name = f"{len(value)} rows of {name}"
            return self._like(f"the {label} grad[{i}]", grads[i], name, reference)

        direct = None if grads[1] is None else like(1, "hparams", hparams)
        return OuterDerivatives(value[()], like(0, "params", params), direct)

    def _like(self, name: str, tree: object, other: str, reference: V) -> V:
        """Return a derivative in the dtypes of its variable, as autodiff does: float64 data would promote float32."""
        check_like(self, name, tree, other, reference)
        return tree_map(lambda leaf, like: np.asarray(leaf, like.dtype), tree, reference)

    @override
    def run(self, function: Callable[..., R], *args: Any, **options: Any) -> R:
        # A status reports results that are not finite. On some processors, BLAS also sets the floating-point flag for
        # finite numbers: https://github.com/numpy/numpy/issues/24067
        with np.errstate(all="ignore"):
            return function(self, *args, **options)

    @override
    @contextmanager
    def isolated(self, inputs: Inputs[P, H], double: bool) -> Iterator[Callable[[P, H], Inputs[P, H]]]:
        def convert(leaf: Any) -> object:
            return np.asarray(leaf, np.float64) if double and self.owns(leaf) and self.is_floating(leaf) else leaf

        own = [leaf for leaf in leaves(inputs[:2]) if isinstance(leaf, np.ndarray)]
        before = [leaf.copy() for leaf in own]
        try:
            yield lambda params, hparams: tree_map(convert, inputs._replace(params=params, hparams=hparams))
        finally:
            for leaf, values in zip(own, before, strict=True):
                if leaf.tobytes() != values.tobytes():
                    leaf[...] = values


def _require(function: object, label: str, method: str) -> None:
    if not hasattr(function, method):
        raise TypeError(
            f"{label} ({getattr(function, '__name__', type(function).__name__)}) has no method {method!r}. The numpy "
            "backend needs objects with analytic derivatives: grad, hvp and cross_vjp of inner (see "
            "bilevel.problems.protocols.InnerProblem), grad of outer (OuterObjective), vjp_params and vjp_hparams of a "
            "step or residual. The torch and jax backends derive them: pass torch or JAX arrays."
        )

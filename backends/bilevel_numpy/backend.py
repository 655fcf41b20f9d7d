"""Derivatives that the problem itself brings, checked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from typing_extensions import override

from bilevel.protocols import Backend, BilevelProblem, InnerDerivatives, OuterDerivatives, Point, Solver
from bilevel.spaces.tree import leaves_with_paths, tree_map
from bilevel.validation import check_dtypes, check_like, check_scalar
from bilevel_numpy.space import NumpySpace


class NumpyBackend(Backend):
    """NumPy arrays and objects with analytic ``grad``, ``hvp`` and ``cross_vjp``."""

    name = "numpy"
    space = NumpySpace()

    @override
    def owns(self, leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray | np.generic)

    @override
    def leaves(self, tree: Any) -> list[tuple[str, Any]]:
        return list(leaves_with_paths(tree))

    @override
    def is_floating(self, leaf: Any) -> bool:
        return np.issubdtype(leaf.dtype, np.floating)

    @override
    def device(self, leaf: Any) -> str | None:
        return None

    @override
    def devices(self) -> list[str]:
        return ["cpu"]

    @override
    def to_host(self, scalar: Any) -> Any:
        return scalar.item()

    @override
    def from_numpy(self, array: Any) -> Any:
        return np.asarray(array)

    @override
    def to_numpy(self, array: Any) -> Any:
        return np.asarray(array)

    @override
    def inner(self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...]) -> InnerDerivatives:
        for method in ("grad", "hvp", "cross_vjp"):
            _require(objective, "the inner objective", method)

        def hvp(v: Any) -> Any:
            product = objective.hvp(params, hparams, v, *args)
            return self._like("the inner hvp", product, "params", params)

        def cross_vjp(v: Any) -> Any:
            product = objective.cross_vjp(params, hparams, v, *args)
            return None if product is None else self._like("the inner cross_vjp", product, "hparams", hparams)

        def cross_jvp(u: Any) -> Any:
            if not hasattr(objective, "cross_jvp"):
                raise TypeError(
                    f"the inner objective ({type(objective).__name__}) has no method 'cross_jvp', which forward mode "
                    "needs on the numpy backend: cross_jvp(params, hparams, vector, *args) returns (∂²L/∂λ∂w) vector "
                    'for a vector like hparams (see bilevel.problems). mode="reverse" does without.'
                )
            product = objective.cross_jvp(params, hparams, u, *args)
            return self._like("the inner cross_jvp", product, "params", params)

        grad = self._like("the inner grad", objective.grad(params, hparams, *args), "params", params)
        return InnerDerivatives(grad, hvp, cross_vjp, cross_jvp)

    @override
    def jacobian(self, function: Any, params: Any, hparams: Any, args: tuple[Any, ...], role: str) -> InnerDerivatives:
        for method in ("vjp_params", "vjp_hparams"):
            _require(function, f"the {role}", method)

        def vjp_params(v: Any) -> Any:
            product = function.vjp_params(params, hparams, v, *args)
            return self._like(f"the {role}'s vjp_params", product, "params", params)

        def vjp_hparams(v: Any) -> Any:
            product = function.vjp_hparams(params, hparams, v, *args)
            return None if product is None else self._like(f"the {role}'s vjp_hparams", product, "hparams", hparams)

        value = function(params, hparams, *args)
        check_like(self, role, value, "params", params)
        check_dtypes(self, role, value, "params", params)
        return InnerDerivatives(value, vjp_params, vjp_hparams)

    @override
    def outer(
        self, objective: Any, params: Any, hparams: Any, args: tuple[Any, ...], role: str = "outer"
    ) -> OuterDerivatives:
        _require(objective, f"the {role} objective", "grad")
        value = np.asarray(objective(params, hparams, *args))
        check_scalar(role, value)
        grads = objective.grad(params, hparams, *args)
        if not isinstance(grads, tuple) or len(grads) != 2:
            raise TypeError(f"the {role} grad: expected the pair (∂F/∂w, ∂F/∂λ), the second None for zero.")
        in_params = self._like(f"the {role} grad[0]", grads[0], "params", params)
        direct = None if grads[1] is None else self._like(f"the {role} grad[1]", grads[1], "hparams", hparams)
        return OuterDerivatives(value[()], in_params, direct)

    def _like(self, name: str, tree: Any, other: str, reference: Any) -> Any:
        """Return a derivative in the dtypes of what it is taken by, as autodiff does: float64 data promote float32."""
        check_like(self, name, tree, other, reference)
        return tree_map(lambda leaf, like: np.asarray(leaf, like.dtype), tree, reference)

    @override
    def execute(
        self, function: Callable[..., Any], solver: Solver | None, problem: BilevelProblem, point: Point
    ) -> Any:
        # What is not finite gets a status, and on some processors BLAS sets the flag for finite numbers, too:
        # https://github.com/numpy/numpy/issues/24067
        with np.errstate(all="ignore"):
            return function(self, solver, problem, point)

    @override
    @contextmanager
    def aside(self, point: Point, double: bool) -> Iterator[Callable[[Any, Any], Point]]:
        def convert(leaf: Any) -> Any:
            convertible = double and self.owns(leaf) and self.is_floating(leaf)
            return np.asarray(leaf, np.float64) if convertible else leaf

        yield lambda params, hparams: tree_map(convert, point._replace(params=params, hparams=hparams))


def _require(function: Any, role: str, method: str) -> None:
    if not hasattr(function, method):
        raise TypeError(
            f"{role} ({getattr(function, '__name__', type(function).__name__)}) has no method {method!r}. The numpy "
            "backend needs analytic derivatives: grad, hvp and cross_vjp of inner, grad of outer (see "
            "bilevel.problems), vjp_params and vjp_hparams of a step or residual. The torch and jax backends derive "
            "them: pass torch or JAX arrays."
        )

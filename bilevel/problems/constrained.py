"""Problems whose params minimize a smooth objective under equalities and inequalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any

from bilevel.linearization import LinearizedMap, Reduction
from bilevel.micro_batches import MicroBatches
from bilevel.problems.gradients import in_params
from bilevel.problems.kinks import kink_width
from bilevel.problems.lagrangian import WAY_OUT, Lagrangian, OfPrimal, primal
from bilevel.problems.problem import check_functions
from bilevel.problems.protocols import Kind
from bilevel.spaces.array import Args, H, P

if TYPE_CHECKING:
    from bilevel.backend import Backend


@dataclass(frozen=True)
class Constrained:
    """Minimize ``outer(w*, λ)`` over λ, where w* minimizes objective(w, λ) subject to h(w, λ) = 0 and g(w, λ) ≤ 0.

    ``params`` are a dict: "w", the tree of variables; "equality", the multipliers ν of h; and "inequality", the
    multipliers μ ≥ 0 of g. A kind of constraint that is None has no entry. `bl.constrained_fit` solves such problems,
    and `bl.with_multipliers` adds the multipliers to the w of another solver.

    The solution satisfies the KKT conditions. An inequality is active if μᵢ + gᵢ > 0, so at a solution if gᵢ = 0 and
    μᵢ > 0. With the active inequalities g_a as equalities, the implicit function theorem gives (Fiacco 1976)

        dF/dλ = ∂F/∂λ − (∂²ℒ/∂λ∂w)ᵀ v − (∂h/∂λ)ᵀ y − (∂g_a/∂λ)ᵀ z,    ℒ = L + ν·h + μ·g,

        ⎡ ∂²ℒ/∂w²  (∂h/∂w)ᵀ  (∂g_a/∂w)ᵀ ⎤ ⎡ v ⎤   ⎡ ∂F/∂w ⎤
        ⎢ ∂h/∂w    0         0          ⎥ ⎢ y ⎥ = ⎢ 0     ⎥ .
        ⎣ ∂g_a/∂w  0         0          ⎦ ⎣ z ⎦   ⎣ 0     ⎦

    The matrix is symmetric and indefinite, so use "minres", "exact" or "gmres". A product takes one Hessian-vector
    product of ℒ. ``hg.adjoint`` is a dict with v, y and z. Damping changes the constraints, so it is an error.

    The derivative exists if the solution is regular: the gradients of the active constraints are linearly
    independent, ∂²ℒ/∂w² is positive definite on their null space, and no active inequality has a multiplier of zero.
    ``info.kinks`` counts the inequalities with gᵢ = μᵢ = 0, to rounding. w*(λ) has a kink there.

    Args:
        objective: (w, hparams, *inner_args) -> scalar, as ``inner`` of `bl.Problem`.
        outer: F, (w, hparams, *outer_args) -> scalar, as in `bl.Problem`. It does not receive the multipliers.
        equality: h, (w, hparams, *inner_args) -> an array. For the numpy backend, a
            `bilevel.problems.protocols.Constraint`.
        inequality: g, in the same form. A bound w ≤ 1 is ``w - 1``.

    Raises:
        TypeError: if a function cannot be called, or if there is neither ``equality`` nor ``inequality``.
        ValueError: at derivatives, if the keys or shapes of ``params`` do not fit.

    >>> import numpy as np, bilevel as bl
    >>> problem = bl.problems.quadratic_program(lambda w, h: w.sum(), Q=np.eye(2), A=np.ones((1, 2)), q="q", b=[1.0])
    >>> problem.equality is not None, problem.inequality is None
    (True, True)
    """

    objective: Callable[..., object]
    outer: Callable[..., object]
    equality: Callable[..., object] | None = None
    inequality: Callable[..., object] | None = None

    def __post_init__(self) -> None:
        check_functions(self, objective="a scalar", outer="a scalar")
        given = {name: "an array" for name in ("equality", "inequality") if getattr(self, name) is not None}
        if not given:
            raise TypeError("Constrained: expected equality or inequality. Without constraints, use bl.Problem.")
        check_functions(self, **given)
        if not isinstance(self.outer, OfPrimal):
            object.__setattr__(self, "outer", OfPrimal(self.outer))

    @property
    def kind(self) -> Kind:
        """The kind of the linear system: symmetric and indefinite."""
        return "constrained"

    @property
    def lagrangian(self) -> Lagrangian:
        """The function of (params, hparams, active, *args) whose gradient is zero at the solution."""
        return Lagrangian(self.objective, self.equality, self.inequality)

    def linearize(self, backend: Backend, params: P, hparams: H, args: Args) -> LinearizedMap[P, H]:
        """Differentiate the KKT conditions on the active set of params."""
        active, values = self._active(backend, params, hparams, args)
        at = backend.inner(self.lagrangian, params, hparams, (active, *args))
        if (known := at.dependence) is not None:  # inactive constraints need not depend on w
            at = at._replace(dependence=lambda: (used := known())._replace(params=[True] * len(used.params)))
        if active is None:
            return at
        kinks = partial(self._kinks, backend, params, values, at.residual)
        return at._replace(reduction=Reduction(at.vjp_params, _same, lambda y, _: y, kinks))

    def value_and_residual(self, backend: Backend, params: P, hparams: object, args: Args) -> tuple[None, P]:
        """Return None, since w* minimizes L only under the constraints, and the residual of the KKT conditions.

        It consists of ∂ℒ/∂w, h, the active entries of g, and −μ of the inactive ones.
        """
        active, _ = self._active(backend, params, hparams, args)
        return None, in_params(backend, self.lagrangian, params, hparams, (active, *args)).grad_params

    def _active(self, backend: Backend, params: Any, hparams: object, args: Args) -> tuple[Any, Any]:
        """Return the mask of the active inequalities, and g. None if there is no inequality."""
        self._check(params, args)
        if self.equality is not None:
            _check_shape("equality", params, self.equality(params["w"], hparams, *args))
        if self.inequality is None:
            return None, None
        multipliers, values = params["inequality"], self.inequality(params["w"], hparams, *args)
        _check_shape("inequality", params, values)
        space = backend.space(multipliers)
        return space.map(lambda m, g: 1.0 * (m + g > 0), multipliers, values), values

    def _check(self, params: Any, args: Args) -> None:
        primal(params)
        names = ["w", *(name for name in ("equality", "inequality") if getattr(self, name) is not None)]
        if set(params) != set(names):
            raise ValueError(f"params: expected a dict with the keys {names}, got the keys {sorted(params)}. {WAY_OUT}")
        if isinstance(args, MicroBatches):
            raise TypeError(
                "inner_args: constraints need all of the data at once, so bl.Constrained takes no bl.MicroBatches. "
                "Pass a tuple."
            )

    def _kinks(self, backend: Backend, params: Any, values: Any, residual: Any) -> Any:
        """Return a tree with one for each inequality whose value and multiplier are both zero, to the error of params.

        The error is rounding, or the residual.
        """
        space, of_values = backend.space(params), backend.space(params["inequality"])
        xp = space.leaf_xp
        least = kink_width(space, residual, space.xp.maximum(space.max_abs(params), of_values.max_abs(values)))
        kinks = of_values.map(
            lambda m, g: 1.0 * (xp.maximum(xp.abs(m), xp.abs(g)) <= least), params["inequality"], values
        )
        return {**space.zeros(), "inequality": kinks}


@dataclass(frozen=True)
class OnActiveSet:
    """(p, λ, ...) -> Φ of a `Constrained` on the active set of p, as an inner loss with the signature of the objective.

    A backend takes the mask of the active set for a constant. So the gradient of this loss is zero at the KKT point,
    and its Hessian is the matrix of the linear system.
    """

    problem: Constrained
    backend: Backend

    @property
    def __signature__(self) -> Signature:
        return signature(self.problem.objective)

    def __call__(self, params: Any, hparams: Any, *args: Any, **named: Any) -> Any:
        problem = self.problem
        if named:
            roles = [role for role in ("objective", "equality", "inequality") if getattr(problem, role) is not None]
            problem = replace(problem, **{role: partial(getattr(problem, role), **named) for role in roles})
        active, _ = problem._active(self.backend, params, hparams, args)
        return problem.lagrangian(params, hparams, active, *args)


def _same(x: P) -> P:
    return x


def _check_shape(name: str, params: Any, values: Any) -> None:
    expected, found = tuple(params[name].shape), tuple(getattr(values, "shape", ()))
    if expected != found:
        raise ValueError(
            f"params[{name!r}]: expected one multiplier for each constraint, in the shape {found} of "
            f"{name}(w, hparams), got the shape {expected}."
        )

"""Differentiable training functions: the conditions that define their results, and checks of the functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import BoundArguments, Parameter, Signature
from typing import Any, NamedTuple

from bilevel.backend import Backend
from bilevel.config import imported_backends
from bilevel.messages import listed
from bilevel.problems.constrained import Constrained, OnActiveSet
from bilevel.problems.protocols import BilevelProblem
from bilevel.spaces.array import Args
from bilevel.spaces.tree import leaves_with_paths
from bilevel.validation import TREES, accepts, check_trees, signature_of

ONLY_PARAMS = "Return only the params, or return (params, aux) and pass has_aux=True."
BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Condition:
    """The condition on w* that a decorator of training functions receives as a function of (params, hparams, *args).

    Attributes:
        decorator: the name of the decorator.
        role: the name of the function in errors: "inner", "step" or "residual".
        noun: the function, in words.
        solution: w*, in words.
        solver: an example of a linear solver.
        prox: the proximal operator of a function with kinks that is added to the inner loss. None: there is none.
        step_size: of the proximal step.
        indefinite: whether the inner loss is the Lagrangian of a constrained minimum.
    """

    decorator: str
    role: str
    noun: str
    solution: str
    solver: str
    prox: Callable[..., Any] | None = None
    step_size: float = 1.0
    indefinite: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether ∂r/∂w is symmetric: r is the gradient of the inner loss."""
        return self.role == "inner" and self.prox is None

    @property
    def symmetric_system(self) -> bool:
        """Whether the linear system is symmetric. A proximal step has a symmetric form of its system."""
        return self.role == "inner"

    def with_prox(self, prox: object, step_size: float) -> "Condition":
        """Return the condition of the minimum of an inner loss plus a function, given by its proximal operator."""
        if prox is None:
            if step_size != 1.0:
                raise ValueError(f"{self.decorator}: step_size is of the proximal step, so it needs prox.")
            return self
        if not callable(prox):
            way_out = f" {_for_problem(prox)}" if isinstance(prox, BilevelProblem) else ""
            raise TypeError(
                f"{self.decorator}: expected prox, a function of (v, hparams, step_size) that returns a tree like "
                f"params, got {_kind(prox)}.{way_out}"
            )
        return replace(self, prox=prox, step_size=step_size)

    def check_function(self, function: object) -> None:
        """Raise a TypeError unless the first argument of the decorator is a function."""
        if not callable(function):
            way_out = f'Write {self.decorator}({self.role}, solver="{self.solver}").'
            if isinstance(function, BilevelProblem):
                way_out = _for_problem(function)
            raise TypeError(
                f"{self.decorator}: expected the {self.noun}, a function of (params, hparams), got {_kind(function)}. "
                + way_out
            )

    def check_training(self, function: object, *given: object, **named: object) -> None:
        """Raise a TypeError unless the decorator was called with a training function."""
        if len(given) != 1 or named or not callable(given[0]):
            got = ", ".join(_kind(each) for each in [*given, *named.values()]) or "nothing"
            call = f"{self.decorator}({self.role})"
            raise TypeError(
                f"{self.decorator}({_name(function, self.role)}) expects a training function, got {got}. Pass the "
                f"{self.noun} first: write @{call} above my_training, or solve = {call}(my_training). Then call the "
                "result with hparams."
            )


MINIMUM = Condition("implicit_minimizer", "inner", "inner loss", "minimum", "cg")
CONSTRAINED = replace(MINIMUM, solver="minres", indefinite=True)
FIXED_POINT = Condition("implicit_fixed_point", "step", "step", "fixed point", "gmres")
ROOT = Condition("implicit_root", "residual", "residual", "root", "gmres")


def minimum(
    backend: Backend, inner: Callable[..., Any], prox: object, step_size: float, equality: Any, inequality: Any
) -> tuple[Condition, Callable[..., Any]]:
    """Return the condition of a minimum, and its function: the inner loss, or its Lagrangian if there are constraints.

    Raises:
        TypeError, ValueError: if an argument is no function, or the arguments do not fit together.
    """
    if equality is None and inequality is None:
        return MINIMUM.with_prox(prox, step_size), inner
    if prox is not None:
        raise ValueError(
            "implicit_minimizer: prox and constraints exclude each other. Write the constraints as a projection, or "
            "the penalty as a smooth loss with constraints."
        )
    CONSTRAINED.check_function(inner)
    return CONSTRAINED, OnActiveSet(Constrained(inner, inner, equality, inequality), backend)


def _for_problem(problem: BilevelProblem) -> str:
    """Return advice for a problem in place of its function."""
    for operator in ("prox", "project"):
        if hasattr(problem, operator):
            prox = "problem.prox" if operator == "prox" else "lambda v, hparams, _: problem.project(v, hparams)"
            return f"Write implicit_minimizer(problem.smooth, prox={prox})."
    if isinstance(problem, Constrained):
        return 'Write implicit_minimizer(objective, solver="minres", equality=..., inequality=...).'
    for condition in (MINIMUM, FIXED_POINT, ROOT):
        if hasattr(problem, condition.role):
            return f"Write {condition.decorator}(problem.{condition.role})."
    return "Pass its function."


def check_fit(fit: object) -> None:
    """Raise a TypeError unless ``fit`` is a function of (hparams, params0)."""
    known = signature_of(fit) if callable(fit) else None
    if not callable(fit) or (known is not None and not accepts(known, 2)):
        got = _kind(fit) if known is None else f"{_name(fit, 'a lambda')}({', '.join(known.parameters)})"
        raise TypeError(f"fit: expected a function fit(hparams, params0) -> params, got {got}.")


class Arguments(NamedTuple):
    """The arguments of ``training(hparams, *args, **shared, **own)``. The condition receives all except ``own``."""

    hparams: Any
    args: Args
    shared: dict[str, Any]
    own: dict[str, Any]


def bind_arguments(
    condition: Condition,
    training: Callable[..., Any],
    function: Callable[..., Any],
    args: Args,
    named: dict[str, Any],
) -> Arguments:
    """Divide the arguments of a call of a training into the arguments of the training and of the condition's function.

    The function receives arguments by position in the same order. It receives keyword arguments and defaults of the
    training under the same names, if it has parameters of these names. The training keeps the others, such as a number
    of steps.

    Raises:
        TypeError: if the arguments do not fit the training or the function.
    """
    name = training_name(training)
    if (known := signature_of(training)) is not None:
        bound = _bind(known, name, args, named)
        bound.apply_defaults()
        later = [p for p in known.parameters.values() if p.kind in BY_POSITION][len(args) :]
        later += [p for p in known.parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
        # A default of a parameter that is only positional stays with the training.
        named = {**{p.name: bound.arguments[p.name] for p in later if p.kind in BY_NAME}, **named}
        if not args and later[:1] and later[0].kind is Parameter.POSITIONAL_OR_KEYWORD:
            args = (named.pop(later[0].name),)  # hparams, by keyword
    if not args:
        raise TypeError(f"{name}: hparams must be the first argument.")
    shared = named
    if (known := signature_of(function)) is not None:
        filled = 1 + len(args)
        shared = {key: value for key, value in named.items() if _takes(known, key, filled)}
        rule = (
            f" The {condition.noun} receives params, and then the arguments of the training: those by position in the "
            "same order, those by keyword under the same names."
        )
        _bind(known, _name(function, condition.role), (None, *args), shared, rule)
    own = {key: value for key, value in named.items() if key not in shared}
    return Arguments(args[0], args[1:], shared, own)


def check_training_result(
    backend: Backend, training: str, result: Any, has_aux: bool = False, only: str = ONLY_PARAMS
) -> tuple[Any, Any]:
    """Return the params and the auxiliary result, which is None without ``has_aux``.

    Args:
        training: its name in messages.
        only: advice in an error about a tuple such as (params, loss).

    Raises:
        TypeError: if the result is not a tree of floating-point arrays, or with ``has_aux`` not a tuple of such a tree
            and another object.
        ValueError: if the tree has no leaves, or its leaves are on different devices.
    """
    if result is None:
        raise TypeError(f"{training} returned None. Return the params.")
    params, aux = result, None
    if has_aux:
        if type(result) is not tuple or len(result) != 2:
            raise TypeError(f"{training} returned {_kind(result)}. With has_aux=True, return (params, aux).")
        params, aux = result
    for path, leaf in backend.leaves(params):
        if backend.owns(leaf) and backend.is_floating(leaf):
            continue
        _check_framework(backend, training, params, path, leaf)
        leaf_kind = f"of {leaf.dtype}" if backend.owns(leaf) else _kind(leaf)
        if not path:
            learned = ", for example a copy of its coef_" if hasattr(params, "coef_") else ""
            raise TypeError(f"{training} returned {_kind(params)}. Return the params{learned}. {TREES}")
        advice = "The params are the first of (params, aux)." if has_aux else only
        raise TypeError(f"{training} returned {_kind(params)}, where {path} is {leaf_kind}. {advice}")
    check_trees(backend, {f"the result of {training}": params}, {})
    return params, aux


def _check_framework(backend: Backend, training: str, params: Any, path: str, leaf: object) -> None:
    """Raise a TypeError if a leaf of params is an array of another framework."""
    for other in imported_backends():
        if other is not backend and other.owns(leaf):
            found = f"{_kind(params)}, where {path} is an array" if path else "an array"
            raise TypeError(
                f"{training} returned {found} of {other.name}, but hparams are of {backend.name}. Convert the params "
                "by np.asarray, torch.as_tensor or jnp.asarray."
            )


def check_fit_result(backend: Backend, result: Any) -> Any:
    """Return the params that a ``fit`` returned. Raise an error as `check_training_result` does."""
    return check_training_result(backend, "fit", result, only="Return only the params.")[0]


@contextmanager
def params_noted(condition: Condition, training: str, params: object) -> Iterator[None]:
    """Add a note to an error of the condition's function: which params it received.

    Their shapes may be wrong. Params can be a tuple. So only an error of the function shows that the result was meant
    as (params, loss).
    """
    try:
        yield
    except Exception as error:
        shapes = [f"params{path} of shape {tuple(leaf.shape)}" for path, leaf in leaves_with_paths(params)]
        error.add_note(f"{training} returned {_kind(params)}, and {condition.role} received {listed(shapes[:5])}.")
        if type(params) is tuple:
            error.add_note(ONLY_PARAMS)
        raise


def training_name(training: object) -> str:
    """Return the name of a training function for messages."""
    return _name(training, "the training")


def _name(function: object, role: str) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    return role if name == "<lambda>" else name


def _bind(known: Signature, name: str, args: Args, named: dict[str, Any], rule: str = "") -> BoundArguments:
    try:
        return known.bind(*args, **named)
    except TypeError as error:
        raise TypeError(f"{name}{known}: {error}.{rule}") from None


def _takes(known: Signature, name: str, filled: int) -> bool:
    """Return whether a function can receive an argument by this name, if ``filled`` arguments are given by position."""
    parameters = list(known.parameters.values())
    later = [p.name for place, p in enumerate(parameters) if p.kind in BY_NAME and place >= filled]
    by_keyword = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    return name in later + by_keyword or any(p.kind is Parameter.VAR_KEYWORD for p in parameters)


def _kind(value: object) -> str:
    if type(value) in (tuple, list):
        return f"a {type(value).__name__} of {len(value)}"  # pyright: ignore[reportArgumentType]
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"

"""Training steps of a loss and an optimizer."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from inspect import Parameter, signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bilevel.validation import check_scalar
from bilevel_jax.partition import Static
from bilevel_jax.training.differentiable import check_optimizer, differentiable, is_optimizer
from bilevel_jax.training.mixed_mode import value_and_grad

GRADIENT = "bilevel gradient"
"""The name of the gradient in a step, for policies of `jax.checkpoint`."""


class TrainingState(NamedTuple):
    """The state of a training run.

    Attributes:
        params: w, the trained arrays.
        optimizer: the state of the optimizer.
        aux: the auxiliary state of a loss with ``has_aux``.
    """

    params: Any
    optimizer: Any
    aux: Any = None


@dataclass(frozen=True)
class TrainingStep(Static):
    """A step of training, (state, hparams, batch) -> state, with derivatives that are right and need little memory.

    The values are optax's. Each step computes the gradient of the loss, updates the optimizer, and adds the update to
    params. The derivatives of the update are as in `differentiable`, and the derivatives of the gradient are as in
    `mixed_mode_grad`. Two steps are equal if their fields are equal, so make the loss and the optimizer once.

    Args:
        loss: a function (params, hparams, batch) -> scalar. With ``has_aux``, it is a function
            (params, hparams, batch, aux) -> (scalar, new aux).
        optimizer: a transformation of optax, or a function hparams -> transformation. The function makes learning
            rates, decay rates and parameters of schedules hyperparameters. `optax.inject_hyperparams` would keep the
            values that `init` received.
        mixed_mode: whether second derivatives of the loss are forward over reverse. Otherwise, they are reverse over
            reverse, which takes several times the memory. Choose False if the loss has a `jax.custom_jvp` whose rule is
            no derivative.
        has_aux: whether the loss has a state, such as the statistics of BatchNorm or a key of random numbers.
            Derivatives flow through this state.

    The update also receives ``value``, ``grad`` and ``value_fn`` (params -> value), if it accepts them. These are the
    further arguments of optax's line searches, for example.

    Raises:
        TypeError: if ``loss`` is no function, or ``optimizer`` is neither a transformation nor a function.

    >>> import optax
    >>> loss = lambda params, hparams, batch: (params - batch) ** 2
    >>> step = TrainingStep(loss, lambda hparams: optax.sgd(hparams["rate"]))
    >>> hparams = {"rate": jnp.array(0.25)}
    >>> state = step.init(jnp.array(3.0), hparams)
    >>> step(state, hparams, jnp.array(1.0)).params.item()
    2.0
    """

    loss: Callable[..., Any]
    optimizer: Any
    _: KW_ONLY
    mixed_mode: bool = True
    has_aux: bool = False

    def __post_init__(self) -> None:
        if is_optimizer(self.loss) or not callable(self.loss):
            got = "an optimizer" if is_optimizer(self.loss) else type(self.loss).__name__
            raise TypeError(f"loss: expected a function of (params, hparams, batch), got {got}. The loss comes first.")
        if not is_optimizer(self.optimizer) and not callable(self.optimizer):
            check_optimizer("optimizer", self.optimizer)

    def init(self, params: Any, hparams: Any = None, aux: Any = None) -> TrainingState:
        """Return the state before the first step.

        Args:
            params: the initial parameters, a tree of arrays.
            hparams: the hyperparameters, if ``optimizer`` is a function.
            aux: the initial state of a loss with ``has_aux``.

        Raises:
            ValueError: if ``optimizer`` is a function and ``hparams`` is absent, or if it returns an
                `optax.inject_hyperparams`; if ``aux`` is given without ``has_aux``.
        """
        if aux is not None and not self.has_aux:
            raise ValueError("aux: the loss has no auxiliary state. Make the step by TrainingStep(..., has_aux=True).")
        if hparams is None and not is_optimizer(self.optimizer):
            raise ValueError("hparams: the optimizer is a function of hparams. Pass them: step.init(params, hparams).")
        params = jax.tree.map(_strong, params)
        inner = jax.tree.map(_strong, self._optimizer(hparams).init(params))
        if not is_optimizer(self.optimizer):
            _check_not_injected(inner)
        return TrainingState(params, inner, aux)

    def __call__(self, state: TrainingState, hparams: Any, batch: Any) -> TrainingState:
        """Return the state after one step on a batch.

        Raises:
            TypeError: if the loss returns no floating-point scalar, or the optimizer has no update.
            ValueError: if the loss returns an array that is no scalar.
        """
        if not isinstance(state, TrainingState):
            raise TypeError(f"state: expected the result of TrainingStep.init, got {type(state).__name__}.")
        optimizer = self._optimizer(hparams)
        differentiate = value_and_grad if self.mixed_mode else _reverse_over_reverse
        (value, aux), grad = differentiate(self._loss, state.params, hparams, batch, state.aux)
        grad = checkpoint_name(grad, GRADIENT)

        def value_fn(params: Any) -> Any:
            return self._loss(params, hparams, batch, state.aux)[0]

        extra = _accepted(optimizer.update, {"value": value, "grad": grad, "value_fn": value_fn})
        updates, inner = differentiable(optimizer).update(grad, state.optimizer, state.params, **extra)
        params = jax.tree.map(lambda w, update: (w + update).astype(w.dtype), state.params, updates)
        # A hyperparameter of another dtype must not change the dtypes of the state, which a loop carries.
        inner = jax.tree.map(lambda old, new: jnp.asarray(new, jnp.asarray(old).dtype), state.optimizer, inner)
        return TrainingState(params, inner, aux)

    def _loss(self, params: Any, hparams: Any, batch: Any, aux: Any) -> tuple[Any, Any]:
        result = self.loss(params, hparams, batch, aux) if self.has_aux else (self.loss(params, hparams, batch), None)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"loss: expected a pair (scalar, new aux), got {type(result).__name__}. Or leave out has_aux=True."
            )
        check_scalar("loss", result[0])
        return result

    def _optimizer(self, hparams: Any) -> Any:
        """Return the transformation at these hyperparameters."""
        if is_optimizer(self.optimizer):
            return self.optimizer
        optimizer = self.optimizer(hparams)
        check_optimizer("optimizer(hparams)", optimizer)
        return optimizer


def _check_not_injected(state: Any) -> None:
    """Raise a ValueError for the state of an `optax.inject_hyperparams`."""

    def injected(node: Any) -> bool:
        return hasattr(node, "hyperparams")

    if any(map(injected, jax.tree.leaves(state, is_leaf=injected))):
        raise ValueError(
            "optimizer: optax.inject_hyperparams keeps the hyperparameters of `init` in the state, so a run does not "
            "depend on hparams. Leave it out: lambda hparams: optax.adam(hparams['rate'])."
        )


def _reverse_over_reverse(loss: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[tuple[Any, Any], Any]:
    return jax.value_and_grad(loss, has_aux=True)(*args)


def _accepted(update: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the further arguments that an update takes."""
    parameters = signature(update).parameters
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def _strong(x: Any) -> jax.Array:
    """Return an array whose dtype does not change in the first step, as weak types of Python numbers do."""
    x = jnp.asarray(x)
    return lax.convert_element_type(x, x.dtype)

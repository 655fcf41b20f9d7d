"""Steps of optimizers, and the derivatives of the steps."""

from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from bilevel.spaces.array import Array, Number, V
from bilevel.spaces.space import Space

S = TypeVar("S")  # the optimizer's state
D = TypeVar("D")  # a derivative of the state, or a derivative with respect to it
K = TypeVar("K")  # the part of the state that a pullback needs


class InnerStep(Protocol, Generic[V, S, D, K]):
    """One step (w, s) -> (w', s') with the gradient g = ∂L/∂w at w, where s is the optimizer's state.

    w' − w depends on s and g only, so ∂w'/∂w is the identity at fixed s and g. The caller adds the derivatives through
    g, which need the Hessian.

    Attributes:
        linear: whether the step is linear in s and g, so that `pullback` does not read g.
    """

    linear: ClassVar[bool]

    def init(self, params: V) -> S:
        """Return the state before the first step."""
        ...

    def zero(self, params: V) -> D:
        """Return zero derivatives of a state, or with respect to a state."""
        ...

    def step(self, grad: V, params: V, state: S) -> tuple[V, S]:
        """Return (w', s')."""
        ...

    def keep(self, state: S) -> K:
        """Return the part of s that `pullback` needs. It is stored for every step."""
        ...

    def pullback(self, grad: V, kept: K, by_params: V, by_state: D) -> tuple[V, D]:
        """Return (dF/dg, dF/ds), from dF/dw' and dF/ds'."""
        ...

    def pushforward(self, grad: V, state: S, d_grad: V, d_params: V, d_state: D) -> tuple[V, D]:
        """Return the derivatives of w' and s', from the derivatives of g, w and s."""
        ...


@dataclass(frozen=True)
class Descent(Generic[V]):
    """w' = w − step_size·g. There is no state."""

    linear: ClassVar[bool] = True

    space: Space[V]
    step_size: Number

    def init(self, params: V) -> None:
        return None

    def zero(self, params: V) -> None:
        return None

    def step(self, grad: V, params: V, state: None) -> tuple[V, None]:
        return self.space.axpy(-self.step_size, grad, params), None

    def keep(self, state: None) -> None:
        return None

    def pullback(self, grad: V, kept: None, by_params: V, by_state: None) -> tuple[V, None]:
        return self.space.scale(-self.step_size, by_params), None

    def pushforward(self, grad: V, state: None, d_grad: V, d_params: V, d_state: None) -> tuple[V, None]:
        return self.step(d_grad, d_params, None)


@dataclass(frozen=True)
class HeavyBall(Generic[V]):
    """m' = momentum·m + g,  w' = w − step_size·m'."""

    linear: ClassVar[bool] = True

    space: Space[V]
    step_size: Number
    momentum: Number

    def init(self, params: V) -> V:
        return self.space.zeros()

    def zero(self, params: V) -> V:
        return self.space.zeros()

    def step(self, grad: V, params: V, state: V) -> tuple[V, V]:
        velocity = self.space.axpy(self.momentum, state, grad)
        return self.space.axpy(-self.step_size, velocity, params), velocity

    def keep(self, state: V) -> None:
        return None

    def pullback(self, grad: V, kept: None, by_params: V, by_state: V) -> tuple[V, V]:
        by_velocity = self.space.axpy(-self.step_size, by_params, by_state)
        return by_velocity, self.space.scale(self.momentum, by_velocity)

    def pushforward(self, grad: V, state: V, d_grad: V, d_params: V, d_state: V) -> tuple[V, V]:
        return self.step(d_grad, d_params, d_state)


class AdamState(NamedTuple, Generic[V]):
    """Moving averages of g and g², and the sums of their weights, 1 − βᵗ, for the bias correction.

    The sums are computed as moving averages of 1, because 1 − β**t cancels in float32.
    """

    mean: V
    square: V
    mean_weight: Number
    square_weight: Number


class AdamTangent(NamedTuple, Generic[V]):
    """A derivative of the two averages, or with respect to them."""

    mean: V
    square: V


@dataclass(frozen=True)
class Adam(Generic[V]):
    """Adam (Kingma & Ba, ICLR 2015): w' = w − step_size·m̂/(√v̂ + eps), as in torch and optax.

    An entry whose gradients were all zero has v̂ = 0, where √v̂ has no derivative. There the derivative of √v̂ counts as
    zero. This gives the true derivative of the step, of size step_size/eps per unit of gradient.
    """

    linear: ClassVar[bool] = False

    space: Space[V]
    step_size: Number
    beta1: Number
    beta2: Number
    eps: Number

    def init(self, params: V) -> AdamState[V]:
        return AdamState(*self.zero(params), mean_weight=0.0 * self.beta1, square_weight=0.0 * self.beta2)

    def zero(self, params: V) -> AdamTangent[V]:
        return AdamTangent(self.space.zeros(), self.space.zeros())

    def step(self, grad: V, params: V, state: AdamState[V]) -> tuple[V, AdamState[V]]:
        xp, new = self.space.leaf_xp, self._average(grad, state)
        c1, c2 = new.mean_weight, new.square_weight

        def move(w: Array, m: Array, v: Array) -> Array:
            return w - self.step_size * (m / c1) / (xp.sqrt(v / c2) + self.eps)

        return self.space.map(move, params, new.mean, new.square), new

    def keep(self, state: AdamState[V]) -> AdamState[V]:
        return state

    def pullback(self, grad: V, kept: AdamState[V], by_params: V, by_state: AdamTangent[V]) -> tuple[V, AdamTangent[V]]:
        space, slopes = self.space, self._slopes(self._average(grad, kept))
        by_mean, by_square = (
            space.map(lambda total, slope, by: total + slope * by, by_total, slope, by_params)
            for by_total, slope in zip(by_state, slopes, strict=True)
        )
        by_grad = space.map(
            lambda g, m, v: (1 - self.beta1) * m + 2 * (1 - self.beta2) * g * v, grad, by_mean, by_square
        )
        return by_grad, AdamTangent(space.scale(self.beta1, by_mean), space.scale(self.beta2, by_square))

    def pushforward(
        self, grad: V, state: AdamState[V], d_grad: V, d_params: V, d_state: AdamTangent[V]
    ) -> tuple[V, AdamTangent[V]]:
        space = self.space
        d_mean = space.map(lambda m, g: self.beta1 * m + (1 - self.beta1) * g, d_state.mean, d_grad)
        d_square = space.map(
            lambda v, g, dg: self.beta2 * v + 2 * (1 - self.beta2) * g * dg, d_state.square, grad, d_grad
        )
        by_mean, by_square = self._slopes(self._average(grad, state))
        d_params = space.map(lambda w, s, m, t, v: w + s * m + t * v, d_params, by_mean, d_mean, by_square, d_square)
        return d_params, AdamTangent(d_mean, d_square)

    def _average(self, grad: V, state: AdamState[V]) -> AdamState[V]:
        beta1, beta2 = self.beta1, self.beta2
        return AdamState(
            mean=self.space.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, grad),
            square=self.space.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, grad),
            mean_weight=beta1 * state.mean_weight + (1 - beta1),
            square_weight=beta2 * state.square_weight + (1 - beta2),
        )

    def _slopes(self, new: AdamState[V]) -> tuple[V, V]:
        """Return ∂w'/∂m' and ∂w'/∂v' per entry."""
        xp, c1, c2 = self.space.leaf_xp, new.mean_weight, new.square_weight

        def by_mean(v: Array) -> Array:
            return -self.step_size / (c1 * (xp.sqrt(v / c2) + self.eps))

        def by_square(v: Array, m: Array) -> Array:
            root = xp.sqrt(v / c2)
            ratio = xp.where(root > 0, (m / c1) / xp.where(root > 0, root, 1.0), 0.0)  # of order one, so no overflow
            return self.step_size * ratio / (2 * c2 * (root + self.eps) ** 2)

        return self.space.map(by_mean, new.square), self.space.map(by_square, new.square, new.mean)

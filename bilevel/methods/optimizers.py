"""The steps that an unroll differentiates through: each optimizer's own, and how derivatives pass them."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bilevel.protocols import Tree, VectorSpace


class InnerStep(Protocol):
    """One step (w, s) -> (w', s') with the gradient g = ∂L/∂w at w; s is the optimizer's state.

    w' is w minus what s and g give, so that w itself passes a derivative on unchanged; the way by g, through the
    Hessian, is the caller's.
    """

    def init(self, params: Tree) -> Any:
        """Return the state before the first step."""
        ...

    def zero(self, params: Tree) -> Any:
        """Return zero derivatives of a state, or by one."""
        ...

    def step(self, grad: Tree, params: Tree, state: Any) -> tuple[Tree, Any]:
        """Return (w', s')."""
        ...

    def keep(self, state: Any) -> Any:
        """Return what `pullback` will need of s; it is stored for every step."""
        ...

    def pullback(self, grad: Tree, kept: Any, by_params: Tree, by_state: Any) -> tuple[Tree, Any]:
        """Return (dF/dg, dF/ds), from dF/dw' and dF/ds'."""
        ...

    def pushforward(self, grad: Tree, state: Any, d_grad: Tree, d_params: Tree, d_state: Any) -> tuple[Tree, Any]:
        """Return the derivatives of w' and s', from those of g, w and s."""
        ...


@dataclass(frozen=True)
class HeavyBall:
    """m' = momentum·m + g,  w' = w − step_size·m'; linear, so that a pullback needs nothing of the state."""

    space: VectorSpace
    step_size: Any
    momentum: Any

    def init(self, params: Tree) -> Tree:
        return self.space.zeros_like(params)

    def zero(self, params: Tree) -> Tree:
        return self.space.zeros_like(params)

    def step(self, grad: Tree, params: Tree, state: Tree) -> tuple[Tree, Tree]:
        velocity = self.space.axpy(self.momentum, state, grad)
        return self.space.axpy(-self.step_size, velocity, params), velocity

    def keep(self, state: Tree) -> None:
        return None

    def pullback(self, grad: Tree, kept: None, by_params: Tree, by_state: Tree) -> tuple[Tree, Tree]:
        by_velocity = self.space.axpy(-self.step_size, by_params, by_state)
        return by_velocity, self.space.scale(self.momentum, by_velocity)

    def pushforward(self, grad: Tree, state: Tree, d_grad: Tree, d_params: Tree, d_state: Tree) -> tuple[Tree, Tree]:
        return self.step(d_grad, d_params, d_state)


class AdamState(NamedTuple):
    """Moving averages of g and g², and the weight that each has gathered, 1 − βᵗ: what corrects their bias.

    The weights are averages of 1, since 1 − β**t would cancel in float32.
    """

    mean: Tree
    square: Tree
    mean_weight: Any
    square_weight: Any


class AdamTangent(NamedTuple):
    """A derivative of the two averages, or by them."""

    mean: Tree
    square: Tree


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, ICLR 2015): w' = w − step_size·m̂/(√v̂ + eps), as in torch and optax.

    An entry whose gradients were all zero has v̂ = 0, where √v̂ has no derivative. There it counts as zero, which
    gives the true derivative of the step: it moves by ∓step_size/eps per unit of gradient.
    """

    space: VectorSpace
    step_size: Any
    beta1: Any
    beta2: Any
    eps: Any

    def init(self, params: Tree) -> AdamState:
        return AdamState(*self.zero(params), mean_weight=0.0 * self.beta1, square_weight=0.0 * self.beta2)

    def zero(self, params: Tree) -> AdamTangent:
        return AdamTangent(self.space.zeros_like(params), self.space.zeros_like(params))

    def step(self, grad: Tree, params: Tree, state: AdamState) -> tuple[Tree, AdamState]:
        xp, new = self.space.xp, self._average(grad, state)
        c1, c2 = new.mean_weight, new.square_weight

        def move(w: Any, m: Any, v: Any) -> Any:
            return w - self.step_size * (m / c1) / (xp.sqrt(v / c2) + self.eps)

        return self.space.map(move, params, new.mean, new.square), new

    def keep(self, state: AdamState) -> AdamState:
        return state

    def pullback(self, grad: Tree, kept: AdamState, by_params: Tree, by_state: AdamTangent) -> tuple[Tree, AdamTangent]:
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
        self, grad: Tree, state: AdamState, d_grad: Tree, d_params: Tree, d_state: AdamTangent
    ) -> tuple[Tree, AdamTangent]:
        space = self.space
        d_mean = space.map(lambda m, g: self.beta1 * m + (1 - self.beta1) * g, d_state.mean, d_grad)
        d_square = space.map(
            lambda v, g, dg: self.beta2 * v + 2 * (1 - self.beta2) * g * dg, d_state.square, grad, d_grad
        )
        by_mean, by_square = self._slopes(self._average(grad, state))
        d_params = space.map(lambda w, s, m, t, v: w + s * m + t * v, d_params, by_mean, d_mean, by_square, d_square)
        return d_params, AdamTangent(d_mean, d_square)

    def _average(self, grad: Tree, state: AdamState) -> AdamState:
        beta1, beta2 = self.beta1, self.beta2
        return AdamState(
            mean=self.space.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, grad),
            square=self.space.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.square, grad),
            mean_weight=beta1 * state.mean_weight + (1 - beta1),
            square_weight=beta2 * state.square_weight + (1 - beta2),
        )

    def _slopes(self, new: AdamState) -> tuple[Tree, Tree]:
        """Return ∂w'/∂m' and ∂w'/∂v', entry by entry."""
        xp, c1, c2 = self.space.xp, new.mean_weight, new.square_weight

        def by_mean(v: Any) -> Any:
            return -self.step_size / (c1 * (xp.sqrt(v / c2) + self.eps))

        def by_square(v: Any, m: Any) -> Any:
            root = xp.sqrt(v / c2)
            ratio = xp.where(root > 0, (m / c1) / xp.where(root > 0, root, 1.0), 0.0)  # of order one: no overflow
            return self.step_size * ratio / (2 * c2 * (root + self.eps) ** 2)

        return self.space.map(by_mean, new.square), self.space.map(by_square, new.square, new.mean)

#!/usr/bin/env bash
# optax 0.2.8: from the third step on, reverse mode through optax.radam returns nan. Forward mode is right.
#
# Steps on (w - x)^2 from w = 0. The derivative dw/dx is finite, as forward mode and central differences show.
# Cause: the square root of a negative number stands behind a `where`. Its derivative is nan, and nan times zero is nan.
# Seen: jax 0.10.2, optax 0.2.8: two steps: 0.379 and 0.379. Three steps: reverse mode nan, forward mode 0.538
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
"$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def train(x, steps):
    rule, w = optax.radam(0.1), jnp.zeros(())
    state = rule.init(w)
    for _ in range(steps):
        updates, state = rule.update(jax.grad(lambda w: (w - x) ** 2)(w), state, w)
        w = optax.apply_updates(w, updates)
    return w


reverse = [float(jax.grad(train)(1.0, steps)) for steps in (2, 3)]
forward = [float(jax.jacfwd(train)(1.0, steps)) for steps in (2, 3)]
print(
    f"jax {jax.__version__}, optax {optax.__version__}: two steps: {reverse[0]:.3g} and {forward[0]:.3g}. "
    f"Three steps: reverse mode {reverse[1]:.3g}, forward mode {forward[1]:.3g}"
)
assert abs(reverse[0] - forward[0]) < 1e-5
assert jnp.isnan(reverse[1]), "reverse mode is finite now"
difference = float((train(1.01, 3) - train(0.99, 3)) / 0.02)
assert abs(forward[1] - difference) < 1e-3
PYTHON

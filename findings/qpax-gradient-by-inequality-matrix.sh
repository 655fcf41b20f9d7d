#!/usr/bin/env bash
# qpax 0.1.4: the gradient of solve_qp_primal by the inequality matrix G is wrong.
#
# minimize ½ xᵀQx + q·x subject to Ax = b, Gx <= h, with one active inequality. jax.grad of ½ ‖x*‖² by G differs from
# central differences of qpax's own solutions, without an error. By q, A, b and h it agrees to six digits.
# Way out: differentiate the KKT system of the active set.
# Seen: qpax 0.1.4, jax 0.10.2: by G 1.077, by differences 1.159; by Q, q, A, b and h they agree
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 qpax==0.1.4
"$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import qpax

jax.config.update("jax_enable_x64", True)
NAMES = ["Q", "q", "A", "b", "G", "h"]
n, k = 4, jax.random.split(jax.random.key(0), 3)
data = {
    "Q": jnp.eye(n),
    "q": jax.random.normal(k[0], (n,)),
    "A": jnp.ones((1, n)),
    "b": jnp.ones(1),
    "G": jax.random.normal(k[1], (3, n)),
    "h": jnp.array([-0.3, 0.1, 8.0]),
}


def objective(data):
    x = qpax.solve_qp_primal(*(data[name] for name in NAMES), solver_tol=1e-12, target_kappa=1e-9)
    return 0.5 * jnp.sum(x**2)


def difference(name, direction, step=1e-5):
    high, low = ({**data, name: data[name] + s * step * direction} for s in (1, -1))
    return (objective(high) - objective(low)) / (2 * step)


errors = {}
gradient = jax.grad(objective)(data)
for i, name in enumerate(NAMES):
    direction = jax.random.normal(jax.random.key(10 + i), data[name].shape)
    if name == "Q":
        direction = direction + direction.T
    expected = difference(name, direction)
    found = jnp.vdot(gradient[name], direction)
    errors[name] = abs(float(found - expected)) / abs(float(expected))
    print(f"by {name}: {found:.5f}, by differences {expected:.5f}")
assert all(errors[name] < 1e-3 for name in ("q", "A", "b", "h")), errors
assert errors["G"] > 0.05, "the gradient by G is right now"
PYTHON

#!/usr/bin/env bash
# JAX 0.11.2 and newer: the transpose of lax.optimization_barrier raises if one of its operands is a constant.
#
# The function below is linear. Up to JAX 0.11.1, its transpose maps ones to [3, 3]. From 0.11.2 on, it raises.
# Way out: add to the constant a scalar that depends on x and is zero, by lax.select.
# Needs Python 3.12 or newer: PYTHON=python3.12 bash findings/jax-optimization-barrier-transpose.sh
# Seen: jax 0.12.0.1: AttributeError: 'jaxlib._jax.ArrayImpl' object has no attribute 'accum'. Tied: [3.0, 3.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.12.0.1 jaxlib==0.12.0.1
"$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp


def barrier(x, constant):
    a, b = jax.lax.optimization_barrier((3 * x, constant))
    return a + b


def plain(x):
    return barrier(x, jnp.zeros(2))


def tied(x):
    return barrier(x, jnp.zeros(2) + jax.lax.select(False, x[0], 0.0))


def transpose(function):
    return jax.linear_transpose(function, jnp.ones(2))(jnp.ones(2))[0]


try:
    transpose(plain)
except AttributeError as error:
    seen = f"AttributeError: {error}"
else:
    raise SystemExit("the transpose works now")
print(f"jax {jax.__version__}: {seen}. Tied: {transpose(tied).tolist()}")
assert "accum" in seen
assert transpose(tied).tolist() == [3.0, 3.0]
PYTHON

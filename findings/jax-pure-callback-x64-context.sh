#!/usr/bin/env bash
# JAX: under the context jax.enable_x64(True), pure_callback may convert float64 arguments to float32 without an error.
#
# A callback of a large computation runs in a thread of the runtime. That thread has the global configuration, not the
# context of the caller. So float64 arguments arrive as float32, and a float64 result raises an error. A small computation
# runs in the thread of the caller, where all is right. With jax.config.update("jax_enable_x64", True), all is right too.
# Way out: pass the bits as pairs of uint32, by jax.lax.bitcast_convert_type.
# Seen: jax 0.10.2: dtypes in the callback: float32. Errors of a float64 result: 5 of 6. By pairs: 0 wrong of 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
"$folder/bin/python" - <<'PYTHON'
import logging

import jax
import jax.numpy as jnp
import numpy as np

logging.disable(logging.CRITICAL)  # JAX logs each error of a callback
seen, failed, wrong = set(), 0, 0


def look(x):
    seen.add(str(x.dtype))
    return np.float32(0)


def back(x):
    return np.asarray(x, np.float64)


def pairs(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


@jax.jit
def looked(x):
    return jax.pure_callback(look, jax.ShapeDtypeStruct((), jnp.float32), jnp.cumsum(x) / 3)


@jax.jit
def returned(x):
    x = jnp.cumsum(x) / 3
    return jax.pure_callback(back, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@jax.jit
def paired(x):
    x = pairs(jnp.cumsum(x) / 3)
    return x, jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


with jax.enable_x64(True):
    for k in range(6):
        x = jnp.ones(200_000) + k
        looked(x).block_until_ready()
        try:
            returned(x).block_until_ready()
        except Exception as error:
            assert "Expected: float64, Actual: float32" in str(error)
            failed += 1
        one, other = paired(x)
        wrong += not np.array_equal(one, other)
print(f"jax {jax.__version__}: dtypes in the callback: {', '.join(sorted(seen))}. ", end="")
print(f"Errors of a float64 result: {failed} of 6. By pairs: {wrong} wrong of 6")
assert "float32" in seen
assert failed > 0
assert wrong == 0
PYTHON

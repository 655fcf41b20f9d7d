#!/usr/bin/env bash
# JAX: after lax.optimization_barrier in a shard_map, a value that is equal on all devices counts as different on each.
#
# The barrier is the identity. But all its outputs vary along the mesh axes of any operand, where lax.cond keeps the axes
# of each. Then an out_spec without the axis raises an error.
# Way out: a barrier for each group of operands that vary along the same axes, or none in a shard_map.
# Seen: jax 0.10.2, on two devices of a CPU: a barrier of an unvarying and a varying array returns two varying arrays
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu
"$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

MESH = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
seen = []


def barrier(a, b):
    return jax.lax.optimization_barrier((a, b))


def branch(a, b):
    return jax.lax.cond(b.sum() > 0, lambda a, b: (a, b), lambda a, b: (a, b), a, b)


def kinds(function):
    def body(a, b):
        seen.append([str(jax.typeof(x)) for x in (a, *function(a, b))])
        return b

    specs = PartitionSpec(), PartitionSpec("d")
    jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=specs[1])(jnp.ones(2), jnp.ones(4))
    return seen[-1]


(before, after_barrier, _), (_, after_cond, _) = kinds(barrier), kinds(branch)
print(f"jax {jax.__version__}: operand {before}, after a barrier {after_barrier}, after a cond {after_cond}")
assert after_cond == before, "cond does not keep the axes of each operand"
assert after_barrier != before, "the barrier keeps the axes of each operand"
PYTHON

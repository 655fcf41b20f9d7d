#!/usr/bin/env bash
# JAX: on a CPU, more than half of the compile time of a plain optimizer step goes to one stage, the emitters of fused loops.
#
# The step is Adam on thirty small vectors. XLA fuses each update to one loop, and an own MLIR pipeline compiles each of these
# loops. Without it (XLA_FLAGS=--xla_cpu_use_fusion_emitters=false), XLA compiles the same program in less than half of the CPU
# time, and the results agree. JAX_DISABLE_MOST_OPTIMIZATIONS=1 leaves that stage on, so it saves less than that.
# Seen: jax 0.10.2: fewer optimizations take 0.60 of the CPU seconds of compiling, no fusion emitters 0.33. Difference: 5e-07
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat >"$folder/step.py" <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np


def step(w, m, v, g):
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, v, g)
    return jax.tree.map(lambda w, m, v: w - m / (jnp.sqrt(v) + 1e-8), w, m, v), m, v


trees = [{str(k): jnp.linspace(1, 2 + i, 4 + k) for k in range(30)} for i in range(4)]
lowered = jax.jit(step).lower(*trees)
start = time.process_time()
compiled = lowered.compile()
spent = time.process_time() - start
np.save(sys.argv[1], np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(compiled(*trees))]))
print(spent)
PYTHON
run() { env "${@:2}" "$folder/bin/python" "$folder/step.py" "$folder/$1.npy"; }
fewer='JAX_DISABLE_MOST_OPTIMIZATIONS=1'
without='XLA_FLAGS=--xla_cpu_use_fusion_emitters=false'
for _ in 1 2 3; do
    printf '%s %s %s\n' "$(run plain)" "$(run fewer $fewer)" "$(run without $without)"
done | tee "$folder/times" >&2
"$folder/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np

plain, fewer, without = np.median(np.loadtxt(f"{sys.argv[1]}/times"), axis=0)
one, other = (np.load(f"{sys.argv[1]}/{name}.npy") for name in ("plain", "without"))
difference = np.max(np.abs(one - other))
print(f"jax {version('jax')}: fewer optimizations take {fewer / plain:.2f} of the CPU seconds of compiling, ", end="")
print(f"no fusion emitters {without / plain:.2f}. Difference: {difference:.0e}")
assert without < 0.6 * plain
assert difference < 1e-6
PYTHON

#!/usr/bin/env bash
# jax 0.10.2: the second derivatives of hypot and betaln are wrong where their two arguments are equal, without an error.
#
# The first derivatives are right there, and the second derivatives are right next to that point. Both functions sort
# their arguments. So a Hessian-vector product of a loss with equal arguments, such as equal weights at the start, is
# wrong.
# Way out: write the formula, such as sqrt(x**2 + y**2), or gammaln(a) + gammaln(b) - gammaln(a + b).
# Seen: jax 0.10.2: hypot at (1, 1) has the Hessian [[0, 0], [0, 0]], true [[0.354, -0.354], [-0.354, 0.354]];
#       betaln at (2, 2) has [[0.039, 0.039], [0.039, 0.039]], true [[0.361, -0.284], [-0.284, 0.361]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
JAX_ENABLE_X64=1 "$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln, gammaln

CASES = {
    "hypot": (jnp.hypot, lambda x, y: jnp.sqrt(x**2 + y**2), 1.0),
    "betaln": (betaln, lambda a, b: gammaln(a) + gammaln(b) - gammaln(a + b), 2.0),
}
for name, (function, formula, at) in CASES.items():
    point = jnp.array([at, at])
    of = {kind: (lambda v, f=f: f(v[0], v[1])) for kind, f in (("function", function), ("formula", formula))}
    assert np.allclose(*(jax.grad(f)(point) for f in of.values())), "the first derivatives differ"
    found, true = (np.asarray(jax.hessian(f)(point)) for f in of.values())
    print(f"jax {jax.__version__}: {name} at ({at:g}, {at:g}): {found.round(3).tolist()}, true {true.round(3).tolist()}")
    assert not np.allclose(found, true, rtol=0.1), f"the second derivative of {name} is right now"
    near = point + jnp.array([0.0, 1e-7])
    assert np.allclose(jax.hessian(of["function"])(near), true, rtol=1e-4)
PYTHON

"""Count the solves that claim success without having it, over 1,000 linear systems of every kind.

    python benchmarks/false_success.py [--systems 1000]

A claim is ``CONVERGED``; it is false if the residual, taken in float64 of the matrix as the dtype holds it, exceeds ten
times the tolerance (at least the dtype's epsilon, below which no solver of that dtype can see).
"""

import argparse
from collections import Counter

import numpy as np

import bilevel as bl
from bilevel.operators.linear_operator import LinearOperator
from bilevel.results import Status

KINDS = ["definite", "indefinite", "singular", "nonsymmetric", "nan", "zero right-hand side"]
RTOLS = [1e-3, 1e-6, 1e-9]
SYMMETRIC = [
    bl.CG(damping=0.0),
    bl.CG(damping=0.0, preconditioner=bl.NystromPreconditioner(rank=5)),
    bl.MINRES(),
    bl.Neumann(terms=200, rtol=1),
    bl.Nystrom(),
]
ANY = [bl.GMRES(restart=20), bl.BiCGStab()]


def system(kind, rng):
    """Return a matrix and a right-hand side in float64."""
    n = int(rng.choice([1, 3, 10, 40]))
    values = np.geomspace(1, 10.0 ** -rng.uniform(0, 10), n)
    if kind == "indefinite":
        values *= rng.choice([-1, 1], n)
    if kind == "singular":
        values[n // 2 :] = 0
    left = np.linalg.qr(rng.standard_normal((n, n)))[0]
    right = np.linalg.qr(rng.standard_normal((n, n)))[0] if kind == "nonsymmetric" else left.T
    matrix = 10.0 ** rng.integers(-6, 7) * (left * values) @ right
    rhs = rng.standard_normal(n)
    if kind == "singular" and rng.random() < 0.5:
        rhs = matrix @ rhs
    if kind == "nan":
        matrix[rng.integers(n), rng.integers(n)] = np.nan
    return matrix, rhs * (kind != "zero right-hand side")


def solve(backend, solver, matrix, rhs, symmetric):
    """Run a solver on a dense system within a backend."""
    A = LinearOperator(backend.space(rhs), lambda v: matrix @ v, symmetric)
    return solver.solve(solver.init(A), A, rhs, None)


def in_dtype(name, matrix, rhs):
    """Return a backend that has the dtype, and the two in it."""
    if name != "bfloat16":
        backend = bl.get_backend("numpy")
        return backend, matrix.astype(name), rhs.astype(name), float(np.finfo(name).eps)
    import torch

    a, b = (torch.tensor(x).to(torch.bfloat16) for x in (matrix, rhs))
    return bl.get_backend("torch"), a, b, torch.finfo(torch.bfloat16).eps


def main():
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    claims, false = Counter(), Counter()
    for i in range(arguments.systems):
        rng = np.random.default_rng((arguments.seed, i))
        kind, dtype = KINDS[i % len(KINDS)], ["float32", "float64", "bfloat16"][i % 7 % 3]
        rtol = float(rng.choice(RTOLS))
        backend, matrix, rhs, eps = in_dtype(dtype, *system(kind, rng))
        true_matrix, true_rhs = (np.asarray(backend.to_numpy(a), np.float64) for a in (matrix, rhs))
        for solver in ANY + (SYMMETRIC if kind != "nonsymmetric" else []):
            name = type(solver).__name__ + (" with Nyström" if getattr(solver, "preconditioner", None) else "")
            solver = bl.get_solver(solver, rtol=rtol)
            with np.errstate(all="ignore"):
                x, info = backend.run(solve, solver, matrix, rhs, kind != "nonsymmetric")
                x = np.asarray(backend.to_numpy(x), np.float64)
                left = np.linalg.norm(true_rhs - true_matrix @ x - solver.damping * x)
            claimed = int(info.status) == Status.CONVERGED
            claims[name, kind] += claimed
            if claimed and not left <= 10 * max(rtol, eps) * np.linalg.norm(true_rhs):
                false[name, kind] += 1
                print(
                    f"false: {name}, {kind}, {dtype}, rtol {rtol:g}, system {i}: {left:.2g}, "
                    f"said {info.residual_norm:.2g}"
                )
    names = dict.fromkeys(name for name, _ in claims)
    print(f"\n{arguments.systems} systems, seed {arguments.seed}: claims of success, false ones in brackets\n")
    print("| |", " | ".join(KINDS), "|\n|---|" + "---|" * len(KINDS))
    for name in names:
        print(f"| {name} |", " | ".join(f"{claims[name, k]} ({false[name, k]})" for k in KINDS), "|")
    print(f"\n{sum(claims.values())} claims, {sum(false.values())} of them false")


if __name__ == "__main__":
    main()

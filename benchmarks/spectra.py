"""Draw the error of v against Hessian-vector products, for each solver on three spectra.

    python benchmarks/spectra.py --out docs/solvers.png

Random symmetric matrices of 500 rows in float64 and one random right-hand side. Counted are all products: those of the
solver's own checks, of a step size, a sketch and a preconditioner too.
"""

import argparse
import dataclasses
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import bilevel as bl

SIZE, DAMPING = 500, 1e-2
BUDGETS = [1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 130, 200, 300]
OUTLIERS = np.geomspace(100, 1, 20)
SPECTRA = {
    "well conditioned (κ = 10)": (np.geomspace(0.1, 1, SIZE), 0.0),
    f"20 large eigenvalues over a small rest, damping {DAMPING:g}": (
        np.concatenate([OUTLIERS, np.geomspace(1e-1, 1e-6, SIZE - 20)]),
        DAMPING,
    ),
    "a tenth of the eigenvalues negative": (
        np.concatenate([-np.geomspace(0.05, 0.5, SIZE // 10), np.geomspace(0.05, 1, SIZE - SIZE // 10)]),
        0.0,
    ),
}
SOLVERS = {
    "Neumann": ("C0", "-", lambda k, d: bl.Neumann(terms=max(k - 12, 0), damping=d)),
    "CG": ("C1", "-", lambda k, d: bl.CG(maxiter=k, rtol=0, damping=d)),
    "CG, Nyström preconditioner of rank 20": (
        "C1",
        "--",
        lambda k, d: bl.CG(maxiter=max(k - 20, 0), rtol=0, damping=d, preconditioner=bl.NystromPreconditioner(rank=20)),
    ),
    "MINRES": ("C2", "-", lambda k, d: bl.MINRES(maxiter=k, rtol=0, damping=d)),
    "GMRES(30)": ("C3", "-", lambda k, d: bl.GMRES(restart=min(k, 30), max_restarts=-(-k // 30), rtol=0, damping=d)),
    "BiCGStab": ("C4", "-", lambda k, d: bl.BiCGStab(maxiter=k // 2, rtol=0, damping=d)),
    "Nyström": ("C5", "-", lambda k, d: bl.Nystrom(rank=k, damping=d) if d else None),
    "identity": ("0.6", ":", lambda k, d: bl.Identity()),
}


def run(solver, matrix, rhs):
    """Return v, the products it took, and how it ended."""
    products = []

    def hvp(v):
        products.append(1)
        return matrix @ v

    linearization = bl.Linearization(0.0, rhs, None, hvp, lambda v: v)
    hg = bl.hypergradient_from(linearization, solver=solver, on_failure="ignore")
    return hg.adjoint, len(products), hg.info.status


def main():
    """Parse the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("spectra.png"))
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    rng = np.random.default_rng(0)
    basis, rhs = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0], rng.standard_normal(SIZE)
    figure, axes = plt.subplots(1, len(SPECTRA), figsize=(13, 4.8), sharey=True, layout="constrained")
    for axis, (title, (values, damping)) in zip(axes, SPECTRA.items(), strict=True):
        matrix = (basis * values) @ basis.T
        exact = np.linalg.solve(matrix + damping * np.eye(SIZE), rhs)
        print(f"\n{title}")
        for name, (color, style, make) in SOLVERS.items():
            points = {}
            for budget in BUDGETS:
                solver = make(budget, damping)
                if solver is None:  # it needs damping
                    break
                if name == "identity":  # its scale is free: the best one
                    solver = dataclasses.replace(solver, scale=abs(exact @ rhs) / (rhs @ rhs))
                v, products, status = run(solver, matrix, rhs)
                points[products] = np.linalg.norm(v - exact) / np.linalg.norm(exact)
            if not points:
                continue
            print(
                f"  {name:<40}" + "  ".join(f"{k}: {error:.1e}" for k, error in list(points.items())[::3]), status.name
            )
            if name == "identity":
                axis.axhline(next(iter(points.values())), color=color, linestyle=style, label=name)
            else:
                axis.plot(points.keys(), points.values(), color=color, linestyle=style, label=name, linewidth=1.6)
                if status in (bl.Status.NEGATIVE_CURVATURE, bl.Status.DIVERGED):
                    axis.plot(*list(points.items())[-1], "x", color=color, label="stopped, and said why")
        axis.set(title=title, xlabel="Hessian-vector products", xscale="log", yscale="log", ylim=(1e-9, 30))
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of v")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="outside lower center", ncols=5)
    figure.savefig(arguments.out, dpi=110)
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()

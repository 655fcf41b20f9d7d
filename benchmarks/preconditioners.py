"""Compare preconditioners of CG on the networks of `networks.py`: Kronecker factors, blocks of layers, sketches.

    python benchmarks/preconditioners.py

The Kronecker factors use all examples and classes. For each tensor they are the nearest product, with the eigenvalues
corrected (EKFAC, George et al. 2018). The inverse per layer is the matrix that all Kronecker factorisations
approximate. Systems are solved in float32 to a relative residual of 1e-5, with at most 400 steps. The time before the
solve is in Gauss-Newton products, for the preconditioners of the library.
"""

import argparse
import time

import networks
import numpy as np
import torch

import bilevel as bl


def rows(net, x):
    """Return a matrix R with RᵀR = the Gauss-Newton matrix: a row for each example and class, in float64."""
    weights, found = list(net.parameters()), []
    logits = net(x)
    p = logits.detach().softmax(1)
    # A row c of roots has ∂²loss/∂logits² = diag(p) − p pᵀ = Σ over c of root rootᵀ.
    roots = torch.diag_embed(p.sqrt()) - p.sqrt()[:, :, None] * p[:, None, :]
    for i in range(len(x)):
        z = net(x[i : i + 1])[0]
        for root in roots[i]:
            grads = torch.autograd.grad(z, weights, root, retain_graph=True)
            found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found).double() / len(x) ** 0.5


def layer_inverse(R, net, damping):
    """Return r -> (B + damping)⁻¹ r, where B has the blocks of the layers."""
    layers = {}
    for (name, _), place in zip(net.named_parameters(), places(net), strict=True):
        layers.setdefault(name.rpartition(".")[0], []).append(place)
    inverses = []
    for place in map(torch.cat, layers.values()):
        block = R[:, place].T @ R[:, place]
        inverses.append((place, torch.linalg.inv(block + damping * torch.eye(len(place), dtype=block.dtype))))
    return lambda r: blockwise(r, [(place, lambda v, M=M: M @ v) for place, M in inverses])


def kronecker_inverse(R, net, damping):
    """Return r -> (K + damping)⁻¹ r, where K is diagonal in the basis of the nearest Kronecker product per tensor."""
    inverses = []
    for weight, place in zip(net.parameters(), places(net), strict=True):
        grads = R[:, place].reshape(len(R), len(weight), -1)  # a bias is a column, so its block is exact
        right = torch.eye(grads.shape[2], dtype=R.dtype)
        left = torch.eye(grads.shape[1], dtype=R.dtype)
        for _ in range(5):  # power iteration (Van Loan & Pitsianis 1993)
            left = torch.einsum("nai,nbi->ab", grads @ right, grads)
            left = left / left.norm()
            right = torch.einsum("naj,nai->ji", left @ grads, grads)
        U, V = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
        values = ((U.T @ grads @ V) ** 2).sum(0) + damping

        def inverse(v, U=U, V=V, values=values):
            return (U @ ((U.T @ v.reshape(values.shape) @ V) / values) @ V.T).reshape(-1)

        inverses.append((place, inverse))
    return lambda r: blockwise(r, inverses)


def places(net):
    """Return the indices of each parameter in the flat vector."""
    sizes = [w.numel() for w in net.parameters()]
    return torch.arange(sum(sizes)).split(sizes)


def blockwise(r, inverses):
    """Apply each inverse to its entries."""
    z = torch.empty_like(r)
    for place, inverse in inverses:
        z[place] = inverse(r[place])
    return z


def preconditioners(net, x, space, damping):
    """Return the preconditioners by name."""
    R = rows(net, x)
    largest = torch.linalg.matrix_norm(R, 2).item() ** 2

    def function(inverse):
        return lambda v: space.unravel(inverse(space.ravel(v).double()).float())

    return {
        "none": None,
        "diagonal": bl.DiagonalPreconditioner(),
        "inverse per layer": function(layer_inverse(R, net, damping)),
        "Kronecker": function(kronecker_inverse(R, net, damping)),
        "Kronecker, damped by 0.1 λmax": function(kronecker_inverse(R, net, 0.1 * largest)),
        "Nyström, rank 100": bl.NystromPreconditioner(100),
        "Nyström, rank 200": bl.NystromPreconditioner(200),
    }


def seconds(function):
    """Return the shortest of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    """Print a table for each network."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    train, val = networks.data()
    backend = bl.get_backend("torch")
    h = torch.tensor(float(np.log(networks.DECAY)))
    for title, net in networks.trained():
        w = {name: p.detach().clone() for name, p in net.named_parameters()}
        space = backend.space(w)
        problems = {curvature: networks.problem(net, curvature) for curvature in ("gauss-newton", "hessian")}
        hessian = problems["hessian"].linearize(backend, w, h, train).vjp_params
        gauss_newton = problems["gauss-newton"].linearize(backend, w, h, train).vjp_params
        product = seconds(lambda A=gauss_newton, w=w: A(w))
        above = 1.1 * max(-np.linalg.eigvalsh(space.materialise(hessian).double().numpy())[0], 0.0) + 1e-3
        damping = {"gauss-newton": 0.0, "hessian": above}
        choices = {
            curvature: preconditioners(net, train[0], space, networks.DECAY + damping[curvature])
            for curvature in problems
        }
        print(f"\n**{title}**\n\n| preconditioner | time before | Gauss-Newton | Hessian, damping {above:.1g} |")
        print("|---|---|---|---|")
        for name in choices["hessian"]:
            cells, before = [], "–"
            for curvature, problem in problems.items():
                solver = bl.CG(maxiter=400, damping=damping[curvature], preconditioner=choices[curvature][name])
                if not name.startswith(("none", "inverse", "Kronecker")) and curvature == "gauss-newton":
                    prepare = seconds(lambda: bl.prepare(solver, problem, w, h, inner_args=train))  # noqa: B023
                    before = f"{prepare / product:.0f}"
                info = bl.hypergradient(
                    problem, w, h, inner_args=train, outer_args=val, solver=solver, on_failure="ignore"
                ).info
                cells.append(f"{info.steps} ({info.residual_norm / info.rhs_norm:.0e})")
            print(f"| {name} | {before} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

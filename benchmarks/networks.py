"""Show what each solver does on the Hessians of two small networks, from random weights to the end of training.

    python benchmarks/networks.py

A convolutional network and an LSTM on scikit-learn's digits, float32, trained by Adam on 800 images; the Hessian is
that of the mean cross-entropy with a weight decay of 1e-3, the right-hand side the gradient of a validation loss.
Errors are against the dense Hessian of the same system (damped as said), solved in float64.
"""

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import bilevel as bl

STAGES = {"random weights": 0, "60 steps of Adam": 60, "2,000 steps of Adam": 2000}
DECAY = 1e-3


class LSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        """Return the logits of images of shape (n, 1, 8, 8)."""
        return self.head(self.lstm(x[:, 0])[0][:, -1])


def convnet():
    """Return a network of two convolutions with 1,898 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.GELU(), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def data():
    """Return training and validation data as tensors."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:1600]
    x = torch.tensor(X[order] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(y[order])
    return (x[:800], y[:800]), (x[800:], y[800:])


def problem(net, curvature):
    """Return the problem of tuning a weight decay."""

    def model(w, h, x):
        del h
        return functional_call(net, w, (x,))

    def penalty(w, h):
        return 0.5 * h.exp() * sum((p**2).sum() for p in w.values())

    def outer(w, h, x, y):
        return nn.functional.cross_entropy(model(w, h, x), y)

    return bl.Problem.from_model(model, nn.functional.cross_entropy, outer, penalty=penalty, curvature=curvature)


def solvers(smallest, largest):
    """Return (label, curvature, solver) for a spectrum: damping above the most negative eigenvalue, and so on."""
    above = 1.1 * max(-smallest, 0.0) + 1e-3
    return [
        ("CG", "hessian", bl.CG(damping=0.0)),
        (f"CG, damping {above:.1g}", "hessian", bl.CG(damping=above)),
        ("CG on Gauss-Newton", "gauss-newton", bl.CG(damping=0.0)),
        ("MINRES", "hessian", bl.MINRES()),
        ("GMRES(50)", "hessian", bl.GMRES(restart=50, max_restarts=4)),
        ("BiCGStab", "hessian", bl.BiCGStab()),
        ("Neumann, 100 terms", "hessian", bl.Neumann(terms=100)),
        (f"Neumann, 100 terms, damping {above:.1g}", "hessian", bl.Neumann(terms=100, damping=above)),
        (f"Nyström of rank 50, damping {above:.1g}", "hessian", bl.Nystrom(rank=50, damping=above)),
    ]


def trained():
    """Yield each network at each stage of its training, as (title, network)."""
    torch.set_num_threads(1)
    (x, y), _ = data()
    for title, make in (("convolutional network", convnet), ("LSTM", LSTM)):
        torch.manual_seed(0)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=DECAY)
        done = 0
        for stage, steps in STAGES.items():
            for _ in range(steps - done):
                batch = torch.randint(len(x), (100,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
            done = steps
            yield f"{title}, {stage}", net


def main():
    """Train, and print a table for each network."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, net in trained():
        table(title, net, *data())


def table(title, net, train, val):
    """Print what each solver does at the weights as they are."""
    backend = bl.get_backend("torch")
    w = {name: p.detach().clone() for name, p in net.named_parameters()}
    h = torch.tensor(float(np.log(DECAY)))
    dense = {}
    for curvature in ("hessian", "gauss-newton"):
        at = problem(net, curvature).linearize(backend, w, h, train)
        matrix = backend.space(w).materialise(at.vjp_params).double().numpy()
        dense[curvature] = (matrix + matrix.T) / 2
    rhs = backend.to_flat(backend.outer(problem(net, "hessian").outer, w, h, val).grad_params)
    values = np.linalg.eigvalsh(dense["hessian"])
    print(
        f"\n**{title}**: {len(rhs):,} weights, {(values < 0).sum()} negative eigenvalues, "
        f"from {values[0]:.2g} to {values[-1]:.2g}\n"
    )
    print("| solver | steps | status | residual / right-hand side | error of v |\n|---|---|---|---|---|")
    for label, curvature, solver in solvers(values[0], values[-1]):
        hg = bl.hypergradient(
            problem(net, curvature), w, h, inner_args=train, outer_args=val, solver=solver, on_failure="ignore"
        )
        matrix = dense[curvature] + solver.damping * np.eye(len(rhs))
        exact = np.linalg.solve(matrix, rhs)
        v = backend.to_flat(hg.adjoint)
        residual = np.linalg.norm(rhs - matrix @ v) / np.linalg.norm(rhs)
        error = np.linalg.norm(v - exact) / np.linalg.norm(exact)
        print(f"| {label} | {hg.info.steps} | {hg.info.status.name} | {residual:.1e} | {error:.1e} |")


if __name__ == "__main__":
    main()

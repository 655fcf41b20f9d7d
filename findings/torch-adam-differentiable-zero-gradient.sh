#!/usr/bin/env bash
# PyTorch 2.13.0: torch.optim.Adam(differentiable=True) has nan as derivative if one gradient entry is exactly zero.
#
# Least squares with two features. The second feature is zero, so the gradient of its weight is zero.
# The derivative of the trained weights by the targets is finite. Autograd returns nan, without a warning.
# Cause: the square root of a second moment that is zero has an infinite derivative, and infinity times zero is nan.
# Way out: start the second moment at 1e-30.
# Seen: torch 2.13.0: derivative [nan, nan], with a start of 1e-30 [0.000467, 0.000934]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch

FEATURES = torch.tensor([[1.0, 0.0], [2.0, 0.0]])


def derivative(second_moment=None):
    targets = torch.ones(2, requires_grad=True)
    w = torch.zeros(2, requires_grad=True).clone()
    optimizer = torch.optim.Adam([w], lr=0.1, differentiable=True)
    if second_moment is not None:
        start = torch.full_like(w, second_moment)
        optimizer.state[w] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": start}
    for _ in range(2):
        now = w.clone()
        loss = (FEATURES @ now - targets).square().sum()
        (w.grad,) = torch.autograd.grad(loss, now, create_graph=True)
        optimizer.step()
    return torch.autograd.grad(w.sum(), targets)[0]


lost, right = derivative(), derivative(second_moment=1e-30)
shown = [float(f"{number:.3g}") for number in right]
print(f"torch {torch.__version__}: derivative {lost.tolist()}, with a start of 1e-30 {shown}")
assert lost.isnan().all(), "Adam's derivative is no longer nan"
assert torch.allclose(right, torch.tensor([0.000467, 0.000934]), rtol=0.01)  # as central differences give it
PYTHON

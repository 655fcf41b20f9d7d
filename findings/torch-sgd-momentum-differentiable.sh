#!/usr/bin/env bash
# PyTorch 2.13.0: torch.optim.SGD(momentum=..., differentiable=True) drops the first gradient from the graph.
#
# Two steps on (w - x)^2 from w = 0 give w = 0.54 x, so dw/dx = 0.54. Autograd returns 0.2, without a warning.
# Cause: the momentum buffer starts as a detached copy of the first gradient.
# Way out: put zeros into optimizer.state[w]["momentum_buffer"] before the first step.
# Seen: torch 2.13.0: w = 0.54, dw/dx = 0.2, with a buffer of zeros 0.54
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch


def train(x, buffer_of_zeros):
    w = torch.zeros(1, requires_grad=True).clone()
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, differentiable=True)
    if buffer_of_zeros:
        optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w)
    for _ in range(2):
        now = w.clone()
        (w.grad,) = torch.autograd.grad((now - x) ** 2, now, create_graph=True)
        optimizer.step()
    return w.sum()


x = torch.ones((), requires_grad=True)
w = train(x, buffer_of_zeros=False)
lost = torch.autograd.grad(w, x)[0].item()
right = torch.autograd.grad(train(x, buffer_of_zeros=True), x)[0].item()
print(f"torch {torch.__version__}: w = {w.item():.3g}, dw/dx = {lost:.3g}, with a buffer of zeros {right:.3g}")
assert abs(w.item() - 0.54) < 1e-5
assert abs(lost - 0.2) < 1e-5, "SGD no longer drops the first gradient"
assert abs(right - 0.54) < 1e-5
PYTHON

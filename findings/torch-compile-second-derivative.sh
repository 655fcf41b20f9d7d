#!/usr/bin/env bash
# PyTorch 2.13.0: the gradient of a compiled function has a wrong derivative, without an error.
#
# "torch.compile with aot_autograd does not currently support double backward" is raised only if the backward pass of
# the function uses an input or a cotangent that requires a gradient. A linear layer with its loss uses none.
# Way out: compute the loss within torch.compiler.set_stance("force_eager").
# Seen: torch 2.13.0: a product of 1 with the Hessian in eager mode, 0 when compiled
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import cross_entropy

x, y = torch.eye(3), torch.tensor([0, 1, 1])


def loss(w):
    return cross_entropy(x @ w, y)


def product(function):
    w = torch.zeros(3, 2, requires_grad=True)
    v = torch.tensor([[1.0, -1.0]]).repeat(3, 1)
    gradient = torch.autograd.grad(function(w) + w.sum(), w, create_graph=True)[0]
    hv = torch.autograd.grad(gradient, w, v, allow_unused=True)[0]
    return 0.0 if hv is None else (v * hv).sum().item()


eager, compiled = product(loss), product(torch.compile(loss, backend="aot_eager"))
print(f"torch {torch.__version__}: a product of {eager:g} with the Hessian in eager mode, {compiled:g} when compiled")
assert eager > 0.5
assert compiled == 0, "the compiled function has a second derivative or an error now"
PYTHON

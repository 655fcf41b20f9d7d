#!/usr/bin/env bash
# PyTorch 2.13.0: a learning rate that requires a gradient works in SGD(differentiable=True), but with no scheduler.
#
# Schedulers write the new rate into the tensor in place. If the rate is a leaf, scheduler.step() raises. If it was
# computed from another tensor, the derivative raises, even though the schedule multiplies the rate by 1.
# Way out: compute the rate of each step from the tensor, and assign it to optimizer.param_groups[0]["lr"].
# Seen: torch 2.13.0: leaf: RuntimeError in scheduler.step(). Computed: RuntimeError in autograd.grad. Assigned: -0.2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch


def train(rate, schedule):
    w = torch.zeros(1, requires_grad=True).clone()
    optimizer = torch.optim.SGD([w], lr=rate, differentiable=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if schedule else None
    for _ in range(2):
        w.grad = torch.ones(1)
        optimizer.step()
        if scheduler:
            scheduler.step()
        else:
            optimizer.param_groups[0]["lr"] = rate * 1.0
    return w.sum()


def error(function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as raised:
        return str(raised)
    raise SystemExit("no error: schedulers accept such a rate now")


leaf = error(train, torch.tensor(0.1, requires_grad=True), True)
assert "a leaf Variable that requires grad" in leaf, leaf
log_rate = torch.tensor(0.1).log().requires_grad_()
computed = error(torch.autograd.grad, train(log_rate.exp(), True), log_rate)
assert "modified by an inplace operation" in computed, computed
(assigned,) = torch.autograd.grad(train(log_rate.exp(), False), log_rate)
assert abs(assigned + 0.2) < 1e-6  # w = -2 exp(log_rate)
print(
    f"torch {torch.__version__}: leaf: RuntimeError in scheduler.step(). "
    f"Computed: RuntimeError in autograd.grad. Assigned: {assigned.item():.3g}"
)
PYTHON

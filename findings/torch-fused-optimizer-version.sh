#!/usr/bin/env bash
# PyTorch 2.13.0: the step of a fused optimizer changes parameters without a new version, so autograd does not notice.
#
# A backward pass after such a step mixes old and new weights, without an error. With fused=False, it raises the error
# "modified by an inplace operation".
# Way out: compute the losses before the step or after it, never on both sides.
# Seen: torch 2.13.0: plain raises, fused returns 6 for the gradient 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch


def gradient_after_step(fused):
    w = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=2.0, fused=fused)
    loss = (w * w).sum()
    w.grad = -torch.ones(1)
    optimizer.step()  # from 1 to 3
    return torch.autograd.grad(loss, w)[0].item()


try:
    plain = gradient_after_step(fused=False)
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error)
    plain = None
fused = gradient_after_step(fused=True)
print(f"torch {torch.__version__}: plain {'raises' if plain is None else plain}, fused returns {fused:g} for the gradient 2")
assert plain is None
assert fused == 6, "the step of a fused optimizer is noticed now"
PYTHON

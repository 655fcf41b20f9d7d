#!/usr/bin/env bash
# PyTorch 2.13.0: torch.func.functional_call of a module that uses torch.utils.checkpoint has a wrong gradient.
#
# A module computes w^3 in a checkpoint. Its own w is 1, and functional_call passes 3. The derivative by the passed weight
# is 27. Autograd returns 3, without a warning.
# Cause: the checkpoint runs the module again in the backward pass. By then, the module has its own weight again.
# Way out: call torch.autograd.grad inside of functional_call. A second derivative has no way out.
# Seen: torch 2.13.0: derivative 3, inside of functional_call 27; second derivative 14 (true: 18)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Cube(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def power(self, x):
        return x * self.w * self.w * self.w

    def forward(self, derivative=False):
        value = checkpoint(self.power, torch.ones(()), use_reentrant=False)
        return torch.autograd.grad(value, PASSED, create_graph=True)[0] if derivative else value


PASSED = torch.tensor(3.0, requires_grad=True)
module = Cube()
value = torch.func.functional_call(module, {"w": PASSED})
outside = torch.autograd.grad(value, PASSED)[0].item()
inside = torch.func.functional_call(module, {"w": PASSED}, (True,))
second = torch.autograd.grad(inside, PASSED)[0].item()
print(
    f"torch {torch.__version__}: w^3 at 3 is {value.item()}; derivative {outside}, inside of functional_call "
    f"{inside.item()} (true: 27.0); second derivative {second} (true: 18.0)"
)
assert value.item() == 27.0
assert outside != 27.0, "the gradient outside of functional_call is right now"
assert inside.item() == 27.0
assert second != 18.0, "the second derivative is right now"
PYTHON

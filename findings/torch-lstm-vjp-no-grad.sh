#!/usr/bin/env bash
# PyTorch 2.13.0: torch.func.vjp of nn.LSTM raises an error inside of torch.no_grad(), and of other modules it does not.
#
# torch.func documents that its transforms compute derivatives inside of no_grad, and GRU, RNN and Linear do. The LSTM's
# forward pass on a CPU leaves out what its backward pass needs if gradients are off outside of the transform.
# Way out: torch.enable_grad() around the call.
# Seen: torch 2.13.0: LSTM raises, GRU is fine
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/python" - <<'PYTHON'
import torch
from torch.func import functional_call, vjp

x = torch.randn(2, 5, 3)


def pulled_back(module):
    weights = {name: p.detach() for name, p in module.named_parameters()}
    z, pull = vjp(lambda w: functional_call(module, w, (x,))[0], weights)
    return pull(torch.ones_like(z))[0]["weight_ih_l0"].shape


gru, lstm = torch.nn.GRU(3, 4, batch_first=True), torch.nn.LSTM(3, 4, batch_first=True)
assert pulled_back(lstm) == (16, 3)
with torch.no_grad():
    assert pulled_back(gru) == (12, 3)
    try:
        pulled_back(lstm)
        seen = "is fine"
    except RuntimeError as error:
        assert "workspace" in str(error)
        seen = "raises"
print(f"torch {torch.__version__}: LSTM {seen}, GRU is fine")
assert seen == "raises", "the LSTM has derivatives inside of no_grad now"
PYTHON

#!/usr/bin/env bash
# accelerate 1.15.0: an Accelerator compiles because an earlier one in the same process did, even with dynamo_backend="no".
#
# All Accelerators of a process share one state. The first one stores its dynamo plugin there, and the later ones do not
# replace it. So after a Trainer with torch_compile=True, a plain loop in the same process compiles its models.
# Way out: accelerator.unwrap_model(net, keep_torch_compile=False) is the module that is not compiled.
# Seen: accelerate 1.15.0, torch 2.13.0: Linear first, OptimizedModule by both later ones, Linear by the way out
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat >"$folder/program.py" <<'PYTHON'
import sys

import accelerate
import torch
from accelerate import Accelerator


def prepared(**options):
    """Return the type of a prepared model, before and after it is unwrapped."""
    accelerator = Accelerator(cpu=True, **options)
    net = accelerator.prepare(torch.nn.Linear(2, 2))
    return type(net).__name__, type(accelerator.unwrap_model(net, keep_torch_compile=False)).__name__


if sys.argv[1] == "after another":
    assert prepared(dynamo_backend="aot_eager")[0] == "OptimizedModule"
    expected = ("OptimizedModule", "Linear")
else:
    expected = ("Linear", "Linear")
found = [prepared(), prepared(dynamo_backend="no")]
print(f"accelerate {accelerate.__version__}, {sys.argv[1]}: {found}")
assert found == [expected, expected]
PYTHON
"$folder/bin/python" "$folder/program.py" alone
"$folder/bin/python" "$folder/program.py" "after another"

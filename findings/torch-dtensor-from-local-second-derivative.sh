#!/usr/bin/env bash
# PyTorch 2.13.0: the second derivative through DTensor.from_local is wrong, without an error, if its gradient is redistributed.
#
# The loss is Σ (w·x)³ over a weight that is sharded by columns, as in tensor parallelism. The input x is replicated, so its
# gradient is Partial. from_local() redistributes this gradient without a graph. So the second derivative by x misses a part.
# Way out: keep DTensors between layers, or redistribute the gradient by a hook before it arrives at from_local().
# Seen: torch 2.13.0: the gradient of x has a graph: False, expected: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/bin/python" - <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
weight = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]).requires_grad_()
x = torch.ones(3, 2, requires_grad=True)
y = torch.nn.functional.linear(DTensor.from_local(x, mesh, [Replicate()]), weight)
(grad,) = torch.autograd.grad((y**3).sum().full_tensor(), x, create_graph=True)
print(f"torch {torch.__version__}: the gradient of x has a graph: {grad.requires_grad}, expected: True")
dist.destroy_process_group()
assert not grad.requires_grad
PYTHON

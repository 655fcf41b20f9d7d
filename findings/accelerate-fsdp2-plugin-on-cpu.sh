#!/usr/bin/env bash
# accelerate 1.15.0: on CPUs, Accelerator ignores a FullyShardedDataParallelPlugin, without a warning.
#
# AcceleratorState reads the plugin only if the kind of processes is MULTI_GPU or another kind of accelerators. With
# MULTI_CPU, prepare() returns a DistributedDataParallel. So each process holds all parameters. fully_shard itself works
# on CPUs with gloo.
# Way out for tests on CPUs: set distributed_type=DistributedType.FSDP and fsdp_plugin in AcceleratorState._shared_state
# after Accelerator() was made. Or call torch.distributed.fsdp.fully_shard.
# Seen: accelerate 1.15.0, torch 2.13.0: DistributedType.MULTI_CPU, DistributedDataParallel, plain parameters, no warning
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/program.py" <<'PYTHON'
import logging
import warnings

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin

records = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())
logging.getLogger("accelerate").addHandler(handler)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    model = accelerator.prepare(torch.nn.Linear(4, 4))
said = [text for text in [*records, *(str(w.message) for w in caught)] if "fsdp" in text.lower()]
kinds = {type(p).__name__ for p in model.parameters()}
if accelerator.is_main_process:
    kind, wrapper = accelerator.distributed_type, type(model).__name__
    print(f"accelerate {accelerate.__version__}: {kind}, {wrapper}, parameters are {kinds}, warnings about FSDP: {said}")
assert dist.get_world_size() == 2
assert (str(accelerator.distributed_type), type(model).__name__) == ("DistributedType.MULTI_CPU", "DistributedDataParallel")
assert kinds == {"Parameter"} and not said
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 "$folder/bin/torchrun" --standalone --nproc-per-node 2 "$folder/program.py"

#!/usr/bin/env bash
# Betty 0.1.1: the hypergradient "darts" (the default) leaves the weights a step away from where they were.
#
# The learning rate of the inner problem is 0, so its weight must stay 1. It falls by darts_alpha = 0.01 in each step of the
# outer problem. Cause: the last loop calls p.data.add(...), which returns a new tensor, in place of p.data.add_(...).
# The two gradients of the difference are at w ± d, as they should be.
# Way out: save the weights before each call and put them back, or choose another hypergradient, such as "neumann".
# Seen: Betty 0.1.1, torch 2.13.0: after 5 steps of the outer problem the weight is 0.95
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/bin/pip" install --quiet --no-deps betty-ml==0.1.1  # so that torch stays
"$folder/bin/python" - <<'PYTHON'
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem

STEPS = 5


class Number(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones(()))

    def forward(self):
        return self.value


class Inner(ImplicitProblem):
    def training_step(self, batch):
        return (self() - self.outer()) ** 2


class Outer(ImplicitProblem):
    def training_step(self, batch):
        return (self.inner() + 1) ** 2


def problem(kind, name):
    module = Number()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    config = Config(type="darts", unroll_steps=1, darts_alpha=0.01)
    return kind(name, config, module, optimizer, train_data_loader=[(torch.zeros(1),)])


inner, outer = problem(Inner, "inner"), problem(Outer, "outer")
dependencies = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
Engine([outer, inner], EngineConfig(train_iters=STEPS), dependencies).run()
w = inner.module.value.item()
print(f"torch {torch.__version__}: after {STEPS} steps with a learning rate of 0, the weight is {w:.4g}, and was 1")
assert abs(w - (1 - 0.01 * STEPS)) < 1e-6, "darts puts the weights back"
PYTHON
